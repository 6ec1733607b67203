"""What a run leaves on disk: log, checkpoints, and which of them stay."""

from moa_diffusion.storage.calibration_file import Calibration, ObjectiveCalibration
from moa_diffusion.storage.checkpoint import find, list_checkpoints, load_state
from moa_diffusion.storage.front import retain
from moa_diffusion.storage.log import RunLog, read_metrics
from moa_diffusion.storage.trackers import TrackerError

__all__ = [
    "Calibration",
    "ObjectiveCalibration",
    "RunLog",
    "TrackerError",
    "find",
    "list_checkpoints",
    "load_state",
    "read_metrics",
    "retain",
]
