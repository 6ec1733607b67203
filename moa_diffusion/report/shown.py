"""Samples of all models beside each other, as their medium is looked at."""

from __future__ import annotations

from pathlib import Path

from moa_diffusion.report.completions import write_completions
from moa_diffusion.report.grid import write_grid
from moa_diffusion.report.table import Table


def write_shown(table: Table, folder: Path, *, shown: int) -> str:
    """Write some prompts with the samples of all models beside each other.

    Args:
        table: The samples; images become ``grid.png``, texts ``completions.md``.
        folder: The folder that the file is written to.
        shown: Number of prompts.

    Returns:
        The file's name.
    """
    if table.texts is None:
        write_grid(table, folder / "grid.png", shown=shown)
        return "grid.png"
    write_completions(table, folder / "completions.md", shown=shown)
    return "completions.md"
