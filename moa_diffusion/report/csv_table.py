"""``summary.csv``: a row per model and reward, for a spreadsheet."""

from __future__ import annotations

import csv
import io
import math

from moa_diffusion.report.summary import Summary
from moa_diffusion.report.table import Table

ESTIMATES = ("mean", "gain", "gain_in_stds", "win_rate")


def csv_text(table: Table, summary: Summary) -> str:
    """Return the numbers of a summary, unrounded; what is not known is empty.

    Args:
        table: The table of E models in K rewards, which gives series, steps and units.
        summary: The summary of that table.

    Returns:
        A line of names, and E x K lines. ``_low`` and ``_high`` are the ends of intervals.
    """
    target = io.StringIO()
    write = csv.writer(target, lineterminator="\n").writerow
    intervals = [f"{name}{end}" for name in ESTIMATES for end in ("", "_low", "_high")]
    write(["model", "series", "step", "reward", "unit", *intervals, "improved", "samples"])
    for column, model in zip(table.models, summary.models, strict=True):
        step = "" if column.step is None else column.step
        for name, one in model.rewards.items():
            numbers = [
                number
                for each in (one.mean, one.gain, one.gain_in_stds, one.win_rate)
                for number in (each.value, each.low, each.high)
            ]
            known = ["" if math.isnan(number) else number for number in (*numbers, one.improved)]
            start = [model.label, model.series, step, name, table.units[name]]
            write([*start, *known, one.samples])
    return target.getvalue()
