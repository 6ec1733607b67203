"""What watches a run: held-out evaluation, drift, alarms."""

from moa_diffusion.monitoring.alarm import Alarm, Watch
from moa_diffusion.monitoring.console import Console
from moa_diffusion.monitoring.heldout import Evaluation, HeldOut
from moa_diffusion.monitoring.lessons import Lessons
from moa_diffusion.monitoring.progress import Progress
from moa_diffusion.monitoring.standing import Standing

__all__ = [
    "Alarm",
    "Console",
    "Evaluation",
    "HeldOut",
    "Lessons",
    "Progress",
    "Standing",
    "Watch",
]
