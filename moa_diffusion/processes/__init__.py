"""What one process is to the others, to the launcher and to the terminal."""

from moa_diffusion.processes.launcher import make_accelerator
from moa_diffusion.processes.stopping import Interrupted, StopRequest

__all__ = [
    "Interrupted",
    "StopRequest",
    "make_accelerator",
]
