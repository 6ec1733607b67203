"""A report of a GPU in a block of Markdown, to be pasted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_rollouts import BUILD, LOAD, PHASES, PREPARE

ONCE = (BUILD, PREPARE, LOAD)


def summary(report: Mapping[str, Any], file: Path) -> str:
    """Return the report's main numbers, what failed, and what to do with the file.

    Args:
        report: What was measured; parts that failed are missing.
        file: Where all of it lies.
    """
    parts = [
        _machine(report),
        _judges(report),
        _phases(report) if "images" in report else "No rollout was measured.",
        _interrupted(report),
        _batches(report),
        _precision(report),
        _cells(report),
        *(f"FAILED: {entry['stage']}: {entry['error']}" for entry in report["problems"]),
        f"All numbers are in {file}. Please open an issue of the project, paste this block "
        "and attach that file. "
        f"`scripts/plan.py --bench {file} --card CARD` plans with the measured rates.",
    ]
    return "\n\n".join(part for part in parts if part)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 1) -> str:
    """Return a table of Markdown.

    Args:
        columns: The names of the columns.
        rows: Cells, a list for each row.
        texts: How many columns are text; those after them are numbers.
    """
    lines = [columns, ["---"] * texts + ["---:"] * (len(columns) - texts), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _machine(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    names = ("torch", "cuda", "cudnn", "driver", "diffusers", "transformers", "peft", "commit")
    known = ", ".join(f"{name} {machine[name]}" for name in names if machine[name] is not None)
    memory = f" with {machine['memory_bytes'] / 1e9:.4g} GB" if "memory_bytes" in machine else ""
    rates = ", ".join(
        f"{rate / 1e12:.4g} TFLOP/s in {name}"
        for name, rate in report.get("matrix_rates", {}).items()
    )
    return (
        f"### {machine['device']}{memory}\n\n{known}. A large matrix product reaches {rates}. "
        f"Method {report['method']}, pipeline `{report['size']}` with random weights in "
        f"{report['dtype']}, VAE in {report['vae_dtype']}, {report['resolution']} px."
    )


def _judges(report: Mapping[str, Any]) -> str:
    seconds = report.get("score_seconds", {})
    rows = [
        [
            judge["name"],
            judge["kind"],
            judge["note"],
            f"{judge['bytes'] / 1e9:.2f}" if "bytes" in judge else "",
            f"{seconds[judge['name']] / report['images']:.4f}" if judge["name"] in seconds else "",
        ]
        for judge in report["judges"]
    ]
    return table(["reward", "what it is", "", "GB", "s/image"], rows, texts=3)


def _phases(report: Mapping[str, Any]) -> str:
    rows = []
    for name in (*ONCE, *PHASES):
        spent = report["seconds"].get(name, 0.0)
        if (
            f"{spent:.3f}" == "0.000"
        ):  # a phase that this method has not, or the first rollout alone
            continue
        peak, share = report["peak_bytes"].get(name, {}), report["share"].get(name)
        rows.append(
            [
                f"{name} (once)" if name in ONCE else name,
                f"{spent:.3f}",
                "" if name in ONCE else f"{spent / report['images']:.4f}",
                *(
                    f"{peak[kind] / 1e9:.2f}" if kind in peak else ""
                    for kind in ("allocated", "reserved")
                ),
                "" if share is None else f"{share:.1%}",
            ]
        )
    gap = report["on_policy"]
    lines = [
        f"{report['geometry']}; {report['trained_steps']} trained steps, medians of "
        f"{report['rollouts']} rollouts. {report['images_per_second']:.3g} images/s sampled, "
        "scored and trained"
        + (
            f", {report['overlapped']['images_per_second']:.3g} with heads at work meanwhile."
            if "overlapped" in report
            else "."
        ),
        table(
            ["phase", "seconds", "s/image", "GB allocated", "GB reserved", "of the matrix rate"],
            rows,
        ),
        f"On-policy gap {gap['ratio_gap']:.2e}, tolerance {gap['tolerance']:.0e}: "
        f"{'held' if gap['held'] else 'NOT HELD'}.",
    ]
    return "\n\n".join(lines)


def _interrupted(report: Mapping[str, Any]) -> str:
    if "interrupted" not in report:
        return ""
    spent = report["interrupted"]["seconds"].items()
    return (
        f"A rollout ended in {report['interrupted']['phase']}, after "
        f"{', '.join(f'{seconds:.3f} s in {name}' for name, seconds in spent)}."
    )


def _batches(report: Mapping[str, Any]) -> str:
    return "\n".join(
        f"- Out of memory in {entry['phase']}: batches of {entry['from']} became {entry['to']}."
        for entry in report.get("halved", ())
    )


def _precision(report: Mapping[str, Any]) -> str:
    if "gradients" not in report:
        return ""
    measured = report["gradients"]
    rows = [
        [f"{row['scale']:g}", str(row["step"]), f"{row['error']:.2e}", f"{row['cosine']:.6f}"]
        for row in measured["rows"]
        if row["window"] == 2 and row["advantages"] == 1.0
    ]
    return (
        f"LoRA gradients in {measured['dtype']} against float32 ({measured['layers']} layers of "
        f"width {measured['hidden']}):\n\n"
        + table(["loss scale", "denoising step", "relative error", "cosine"], rows)
    )


def _cells(report: Mapping[str, Any]) -> str:
    if "sweep" not in report:
        return ""
    rows = []
    for cell in report["sweep"]:
        numbers = [""] * 5
        if cell["status"] == "measured":
            peak = cell["peak_bytes"]
            numbers = [
                f"{cell['sample_seconds']:.4f}",
                f"{cell['update_seconds']:.4f}",
                *(
                    f"{peak[kind] / 1e9:.2f}" if kind in peak else ""
                    for kind in ("allocated", "reserved")
                ),
                f"{cell['ratio_gap']:.1e}",
            ]
        checkpointing = "on" if cell["checkpointing"] else "off"
        compiled = cell["compile"] or "off"
        settings = [str(cell["micro_batch"]), checkpointing, cell["attention"], compiled]
        rows.append([", ".join(settings), cell["status"], *numbers])
    columns = ["micro-batch, checkpointing, attention, compile", "", "sample s/image"]
    columns += ["update s/image", "GB allocated", "GB reserved", "gap"]
    left = len(report["not_reached"])
    return (
        "Updates with other settings, without judges on the card:\n\n"
        + table(columns, rows, texts=2)
        + (f"\n\n{left} further settings were not reached in the time." if left else "")
    )
