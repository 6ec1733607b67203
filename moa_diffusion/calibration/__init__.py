"""What rewards look like before training."""

from moa_diffusion.calibration.describe import calibrate
from moa_diffusion.calibration.measure import Measurement, findings, measure, report
from moa_diffusion.calibration.plot import plot_calibration

__all__ = [
    "Measurement",
    "calibrate",
    "findings",
    "measure",
    "plot_calibration",
    "report",
]
