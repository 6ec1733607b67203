"""Tables and runs to write a page of, and what stands in it."""

from __future__ import annotations

import html.parser
import json
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from moa_diffusion.report.summary import Summary, summarise
from moa_diffusion.report.table import Column, Table

EVIL = '</script><script>window.stolen = 1</script><img src=x onerror="window.stolen = 1">'


def column(label: str, step: int | None = None) -> Column:
    series = label.partition("/")[0] if "/" in label else ""
    return Column(
        label=label,
        series=series,
        step=step,
        weights=None,
        model_digest="m" * 8,
        adapter_digest="" if label == "base" else "a" * 8,
    )


def table_of(
    values: numpy.ndarray, folder: Path | None, *, prompts: tuple[str, ...] = (), side: int = 40
) -> Table:
    """``values [E, K, P, S]``; images of noise in a folder, or texts without one."""
    models, rewards, count, seeds = values.shape
    random = numpy.random.default_rng(0)

    def draw(e: int, p: int, s: int) -> Path:
        assert folder is not None
        path = folder / "images" / f"{e}-{p}-{s} #.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        pixels = random.integers(0, 256, (side, side, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(path)
        return path

    def cells(make: Any) -> Any:
        return tuple(
            tuple(tuple(make(e, p, s) for s in range(seeds)) for p in range(count))
            for e in range(models)
        )

    return Table(
        models=(column("base"), *(column(f"run/step-{e}", e) for e in range(1, models))),
        prompts=prompts or tuple(f"prompt {p}" for p in range(count)),
        seeds=tuple(range(seeds)),
        rewards=tuple(f"reward{k}" for k in range(rewards)),
        values=values,
        images=None if folder is None else cells(draw),
        texts=None if folder is not None else cells(lambda e, p, s: f"text {e} {p} {s} {EVIL}"),
        units={f"reward{k}": "points" for k in range(rewards)},
        scorers={f"reward{k}": {"version": "1", "digest": "d"} for k in range(rewards)},
        sampler={"steps": 4, "guidance": 1.5},
    )


def random_values(*shape: int) -> numpy.ndarray:
    return numpy.random.default_rng(1).normal(size=shape)


def short_summary(table: Table) -> Summary:
    return summarise(table, resamples=20)


class Page(html.parser.HTMLParser):
    """Elements with their attributes, and the texts of scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append((dict(attributes), ""))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data

    def json(self, name: str) -> Any:
        return json.loads(next(text for given, text in self.scripts if given.get("id") == name))


def write_run(folder: Path, rows: list[dict[str, Any]], alarms: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if alarms:
        (folder / "alarms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alarms))
    return folder
