"""The page: its data, its script and its thumbnails in one HTML file."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from moa_diffusion.files.writing import write_text
from moa_diffusion.report.csv_table import csv_text
from moa_diffusion.report.page.cards import Card, cards
from moa_diffusion.report.page.front_chart import front_chart
from moa_diffusion.report.page.payload import distinct, page_data, rounded
from moa_diffusion.report.page.runs import Training, read_training
from moa_diffusion.report.page.thumbnails import thumbnails
from moa_diffusion.report.page.training_charts import training_charts
from moa_diffusion.report.palette import PLUS, marks
from moa_diffusion.report.summary import Summary, best_of, worst_gain
from moa_diffusion.report.table import Table
from moa_diffusion.statistics.bootstrap import LEVEL

if TYPE_CHECKING:
    import jinja2

NAME = "report.html"
HERE = Path(__file__).parent / "assets"
STYLES = ("page.css", "images.css")
SCRIPTS = ("page.js", "summary.js", "dialog.js", "grid.js", "samples.js", "charts.js", "front.js")
PACKAGES = ("moa-diffusion", "torch", "diffusers", "transformers", "peft", "accelerate")


def write_report(
    table: Table,
    summary: Summary,
    runs: Mapping[str, Path],
    target: Path,
    *,
    budget: int = 18_000_000,
) -> Path:
    """Write one HTML file that needs nothing beside it; links to the originals are relative.

    Args:
        table: The table of E models, with images or with texts.
        summary: The summary of the table.
        runs: Training run folders by series; empty: no curves.
        target: The HTML file that is written.
        budget: Bytes of the file at most; the thumbnails shrink until it fits.

    Returns:
        The file.

    Raises:
        ConfigError: If a run's file is damaged, an image is missing, or nothing fits.
    """
    trainings = {name: read_training(name, folder) for name, folder in runs.items()}
    files = distinct(table)
    headline = cards(table, summary, trainings, runs, target.parent)
    evaluated = list(dict.fromkeys(model.series for model in table.models if model.series))
    mark = marks([*evaluated, *trainings])
    front = front_chart(table, summary, mark)
    content = page_data(
        table,
        front,
        mark,
        files,
        noise=summary.units,
        folder=target.parent,
        first=_first(headline, summary),
    )
    parts = {
        "cards": headline,
        "csv": f"data:text/csv;charset=utf-8,{quote(csv_text(table, summary))}",
        "models": _models(table, summary, trainings),
        "table": table,
        "summary": summary,
        "runs": trainings,
        "evaluated": evaluated,
        "marks": mark,
        "plus": PLUS,
        "front": front.figure,
        "training": training_charts(list(trainings.values()), table.units, mark),
        "pooled": max((run.pooled for run in trainings.values()), default=1),
        "versions": versions(),
        "level": f"{LEVEL:.0%}",
        "digits": _significant,
        "data": content,
        "json": _json,
    }
    without = _render(parts, [])
    small = thumbnails(files, budget - len(without.encode()))
    write_text(target, _render(parts, small))
    return target


def _first(headline: Sequence[Card], summary: Summary) -> int:
    """Return the model that is selected at first: the best of all series."""
    return best_of([card.best.model for card in headline], summary) if headline else 0


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that results depend on."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed


@cache
def _environment() -> jinja2.Environment:
    """Return where the templates are, which are compiled once."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _render(parts: Mapping[str, Any], small: Sequence[str]) -> str:
    import plotly.offline
    from markupsafe import Markup

    # A block of its own: nothing of it becomes a global name.
    own = f'"use strict";\n{{\n{_joined(SCRIPTS)}}}\n'
    scripts = (plotly.offline.get_plotlyjs(), own)
    template = _environment().get_template("page.html.j2")
    return template.render(
        {
            **parts,
            "style": Markup(_joined(STYLES)),
            "scripts": [Markup(script) for script in scripts],
            "allowed": [_digest(script) for script in scripts],
            "thumbnails": small,
        }
    )


def _joined(names: Sequence[str]) -> str:
    return "\n".join((HERE / name).read_text(encoding="utf-8") for name in names)


def _digest(script: str) -> str:
    """Return the name by which a Content-Security-Policy allows a script to run."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def _json(value: Any) -> Any:
    """Return JSON that cannot end the element, or the attribute in ``'``, that it stands in."""
    from markupsafe import Markup

    text = json.dumps(rounded(value), allow_nan=False, separators=(",", ":"))
    for letter in "<>&'":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _significant(value: Any) -> str:
    """Return a number of an alarm or a setting; other values as they are."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _models(table: Table, summary: Summary, runs: Mapping[str, Training]) -> list[dict[str, Any]]:
    """Return rows of the table of all models."""
    rows = []
    for column, one in zip(table.models, summary.models, strict=True):
        base = not column.series
        worst = worst_gain(one, summary)
        kept = [
            reason
            for entry in (runs[column.series].front if column.series in runs else ())
            if entry["step"] == column.step
            for reason in entry.get("kept_for", ())
        ]
        rows.append(
            {
                "label": column.label,
                "means": [one.rewards[name].mean.text(".4g") for name in table.rewards],
                "worst": "-" if base or worst is None else f"{worst[1]:+.2f} ({worst[0]})",
                "front": one.nondominated,
                "kept": ", ".join(kept),
            }
        )
    return rows
