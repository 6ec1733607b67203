"""Methods against each other: runs, results, plots."""

from moa_diffusion.comparison.curves import plot_curves
from moa_diffusion.comparison.execute import execute
from moa_diffusion.comparison.plan import ComparisonPlan, plan_comparison
from moa_diffusion.comparison.plot import plot_comparison
from moa_diffusion.comparison.read import RunData, read_run
from moa_diffusion.comparison.results import Comparison, compare, table

__all__ = [
    "Comparison",
    "ComparisonPlan",
    "RunData",
    "compare",
    "execute",
    "plan_comparison",
    "plot_comparison",
    "plot_curves",
    "read_run",
    "table",
]
