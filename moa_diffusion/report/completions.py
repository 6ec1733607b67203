"""``completions.md``: rows prompts, columns models, one seed, scores under each completion."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from moa_diffusion.files.captions import score_text
from moa_diffusion.files.writing import write_text
from moa_diffusion.report.grid import shown_prompts
from moa_diffusion.report.table import Table

_MARKUP = re.compile(r"[\\`*_{}\[\]|~#$!]")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def write_completions(table: Table, target: Path, *, shown: int = 12) -> None:
    """Write a Markdown file.

    Args:
        table: The table of E models and P prompts, with texts; the first seed is shown.
        target: The Markdown file that is written.
        shown: At most this many prompts, as in the grid of images.
    """
    assert table.texts is not None
    head = ["prompt", *(literal(model.label) for model in table.models)]
    rows = [head, ["---"] * len(head)]
    for p in shown_prompts(len(table.prompts), shown):
        cells = [literal(table.prompts[p])]
        for e in range(len(table.models)):
            scores = zip(table.rewards, table.values[e, :, p, 0].tolist(), strict=True)
            numbers = "<br>".join(f"{literal(name)} {score_text(score)}" for name, score in scores)
            cells.append(f"{literal(table.texts[e][p][0]) or '*nothing*'}<br><br>{numbers}")
        rows.append(cells)
    title = f"# Completions, seed {table.seeds[0]}"
    write_text(target, f"{title}\n\n{_table(rows)}\n")


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table without padding: a long completion would fill every other row with blanks."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def literal(text: str) -> str:
    """Return a text as a cell of a Markdown table that shows it as it is."""
    lines = []
    for line in text.splitlines():
        line = line.replace("\t", " ")
        plain = "".join(letter if letter.isprintable() else "\ufffd" for letter in line)
        escaped = _MARKUP.sub(r"\\\g<0>", plain)
        lines.append("".join(_ENTITIES.get(letter, letter) for letter in escaped).strip())
    return "<br>".join(lines)
