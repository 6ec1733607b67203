"""The reports as tables for a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.train import COLUMNS, GUIDANCE, STEPS


def print_training(report: Mapping[str, Any]) -> None:
    """Print two tables: the ratios, and where the time goes."""
    machine = report["machine"]
    _print(
        f"Pipeline {report['pipeline']}: {report['parameters'] / 1e6:.1f} M parameters in "
        f"transformer and encoders, {report['resolution']} px, {report['tokens']} T5 tokens. "
        f"{STEPS} steps, CFG {GUIDANCE}, batch {report['batch']}, one thread; medians of "
        f"{report['rounds']} interleaved rounds; load {machine['load']:.1f} on "
        f"{machine['cores']} cores.",
        *_training_tables(report),
    )


def _training_tables(report: Mapping[str, Any]) -> tuple[Table, Table]:
    unit = report["plain"]["seconds"]
    ratios = Table(title="CPU seconds per image")
    parts = Table(title="Where it goes, in plain calls")
    for column in ("", "steps/forward", "s/image", "x plain call", "target", ""):
        ratios.add_column(column, justify="left" if not column else "right")
    for column in ("", "steps", *COLUMNS):
        parts.add_column(column, justify="right" if column else "left", no_wrap=True)
    best: dict[str, float] = {}
    for case in report["cases"]:
        best[case["name"]] = min(case["ratio"], best.get(case["name"], case["ratio"]))
    plain = {"name": "plain call", "ratio": 1.0, "target": None, "trained": False}
    for row in (plain | report["plain"], *report["cases"]):
        chosen = row["trained"] and row["ratio"] == best[row["name"]]
        verdict = "met" if row["target"] and row["ratio"] <= row["target"] else "missed"
        batch = str(row["step_batch"]) if row["trained"] else ""
        ratios.add_row(
            row["name"],
            batch,
            f"{row['seconds']:.4f}",
            f"{row['ratio']:.2f}",
            f"<= {row['target']}" if row["target"] else "",
            f"best: {verdict}" if chosen else "",
        )
        shares = [row["phases"][column] / unit for column in COLUMNS]
        parts.add_row(row["name"], batch, *(f"{s:.3f}" if s else "" for s in shares))
    return ratios, parts


def print_gradients(report: Mapping[str, Any]) -> None:
    """Print ratios to one ordinary backward pass, and the memory."""
    machine, (image, text) = report["machine"], report["tokens"]
    table = Table(title="CPU seconds")
    for column in ("", "forward", "backward", "x ordinary", "target", "with forward", "rows, MB"):
        table.add_column(column, justify="right" if column else "left")
    for row in report["ways"]:
        verdict = "met" if row["target"] and row["ratio"] <= row["target"] else "missed"
        table.add_row(
            row["name"],
            f"{row['forward']:.3f}",
            f"{row['backward']:.3f}",
            f"{row['ratio']:.3f}",
            f"<= {row['target']}: {verdict}" if row["target"] else "",
            f"{row['ratio_with_forward']:.3f}",
            f"{row['bytes'] / 1e6:.1f}",
        )
    _print(
        f"Width {report['hidden']}, {report['layers']} layers with random weights, "
        f"{report['dtype']}; {report['rows']} rows of {image} image and {text} text tokens; LoRA "
        f"of rank {report['rank']} with {report['trained'] / 1e6:.2f} M parameters. One thread; "
        f"medians of {report['rounds']} interleaved rounds; load {machine['load']:.1f} on "
        f"{machine['cores']} cores.",
        table,
        "Beyond an ordinary backward pass it takes the rows, and for a layer at a time "
        f"{report['temporary_bytes'] / 1e6:.1f} MB, whatever K.",
    )


def print_methods(report: Mapping[str, Any]) -> None:
    """Print ratios to the same step in the unit: with static weights, or without a guard."""
    machine, unit = report["machine"], f"x {report['unit']}"
    layers = "layer" in report["methods"][0]
    table = Table(title="CPU seconds per training step")
    last = ("target", "objectives, ms") if layers else ()
    for column in ("", "step", unit, "update", unit, *last):
        table.add_column(column, justify="right" if column else "left")
    for row in report["methods"]:
        cells = [row["name"]]
        for part in ("step", "update"):
            cells += [f"{row[part]:.3f}", f"{row[f'{part}_ratio']:.3f}"]
        if layers:
            verdict = "met" if row["target"] and row["step_ratio"] <= row["target"] else "missed"
            cells += [f"<= {row['target']}: {verdict}" if row["target"] else ""]
            cells += [f"{1e3 * row['layer']:.2f}"]
        table.add_row(*cells)
    explained = "Objectives: normalise, weigh and combine 4 x 1152 rewards." if layers else ""
    _print(
        f"Pipeline {report['pipeline']}, {report['samples']} samples, K = 4 rewards, one thread; "
        f"medians of {report['rounds']} interleaved rounds; load {machine['load']:.1f} on "
        f"{machine['cores']} cores. {explained}",
        table,
    )


def print_ocr(report: Mapping[str, Any]) -> None:
    """Print accuracy and CPU time of every engine that is installed."""
    machine = report["machine"]
    table = Table(title="OCR engines")
    for column in ("engine", "pixels", "noise", "exact", "mean score", "CPU ms/image", "target"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for row in report["rows"]:
        target = ""
        if row["target"]:
            exact, limit = row["target"]
            reached = row["exact"] >= exact and row["milliseconds"] <= limit
            target = f">= {exact}, <= {limit:g} ms: {'met' if reached else 'missed'}"
        table.add_row(
            row["engine"],
            str(row["side"]),
            f"{row['noise']:g}",
            f"{row['exact']:.3f}",
            f"{row['mean']:.3f}",
            f"{row['milliseconds']:.0f}",
            target,
        )
    _print(
        f"{report['images']} images per row, one or two words each; Gaussian noise in units of "
        f"full scale. One thread; load {machine['load']:.1f} on {machine['cores']} cores.",
        table,
        *(f"Without {engine}: {reason}" for engine, reason in report["absent"].items()),
    )


def print_precision(report: Mapping[str, Any]) -> None:
    """Print relative errors by trained steps, size of the advantages and loss scale."""
    machine = report["machine"]
    table = Table(title="LoRA gradient in float16 against float32")
    for column in ("trained steps", "advantages", "loss scale", "step", "relative error", "cosine"):
        table.add_column(column, justify="right")
    for row in report["rows"]:
        table.add_row(
            str(row["window"]),
            f"{row['advantages']:g}",
            f"2^{math.log2(row['scale']):.3g}",
            "sum" if row["step"] is None else str(row["step"]),
            f"{row['error']:.4f}",
            f"{row['cosine']:.5f}",
        )
    _print(
        f"Width {report['hidden']}, {report['layers']} layers with random weights; "
        f"{report['dimensions']} numbers in a latent; one sample of a minibatch of "
        f"{report['samples']}. One thread; {machine['cores']} cores.",
        table,
    )


def print_remote(report: Mapping[str, Any]) -> None:
    """Print the throughput and the CPU time of both processes."""
    machine = report["machine"]
    table = Table(title="Scoring")
    for column in ("checkout", "head", "images/s", "client, CPU ms/image", "server"):
        table.add_column(column, justify="right" if "/" in column else "left")
    for row in report["rows"]:
        numbers = (f"{row[name]:.2f}" for name in ("per_second", "client", "server"))
        table.add_row(row["tree"], row["way"], *numbers)
    _print(
        f'Head "{report["head"]}", in the client and behind a reward server on the same machine; '
        f"batches of {report['images']} images of {report['side']} px. One thread; medians of "
        f"{report['rounds']} interleaved rounds; load {machine['load']:.1f} on "
        f"{machine['cores']} cores.",
        table,
    )


def _print(*parts: Any) -> None:
    console = Console(highlight=False)
    console.width = max(console.width, 120)  # less would cut the breakdown's numbers
    for part in parts:
        console.print(part)


PRINT: dict[str, Callable[[Mapping[str, Any]], None]] = {  # by sub-command
    "train": print_training,
    "gradients": print_gradients,
    "methods": print_methods,
    "guards": print_methods,
    "ocr": print_ocr,
    "precision": print_precision,
    "remote": print_remote,
}


def show(command: str, report: Mapping[str, Any], file: Path | None) -> None:
    """Print a report and, if a file is named, write all its numbers there as JSON.

    Args:
        command: Sub-command that the report is of.
        report: What was measured.
        file: In a folder that is made if need be.
    """
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    PRINT[command](report)
