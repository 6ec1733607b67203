"""``report.html``: one file that shows an evaluation and the runs behind it, without a network."""

from moa_diffusion.report.page.page import write_report
from moa_diffusion.report.page.runs import Training, read_training

__all__ = ["Training", "read_training", "write_report"]
