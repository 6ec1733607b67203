"""What an evaluation says: tables, a grid of images, the page."""

from moa_diffusion.report.completions import write_completions
from moa_diffusion.report.grid import write_grid
from moa_diffusion.report.page.page import write_report
from moa_diffusion.report.pareto_plot import write_pareto
from moa_diffusion.report.summary import Summary, summarise, write_summary
from moa_diffusion.report.table import Column, Table, read_table

__all__ = [
    "Column",
    "Summary",
    "Table",
    "read_table",
    "summarise",
    "write_completions",
    "write_grid",
    "write_pareto",
    "write_report",
    "write_summary",
]
