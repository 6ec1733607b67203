"""What a run needs of GPUs, disk and time, computed before anything is loaded."""

from moa_diffusion.planning.forecast import Forecast
from moa_diffusion.planning.gpus import GPUS, Gpu, gpu
from moa_diffusion.planning.planner import Planner

__all__ = ["GPUS", "Forecast", "Gpu", "Planner", "gpu"]
