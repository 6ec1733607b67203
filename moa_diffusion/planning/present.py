"""A plan as tables, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from moa_diffusion.planning.forecast import EAGER, RESERVE, SINGLE, Forecast
from moa_diffusion.planning.gpus import GPUS, Gpu
from moa_diffusion.planning.planner import LOAD, Planner
from moa_diffusion.planning.variants import remedy, variants
from moa_diffusion.report.markdown import markdown

GB, TERA = 1e9, 1e12
NONE_IS_ENOUGH = "none of the settings below is enough"


class Plan:
    """What is told of a run; all of it computed, but for what ``reached`` says.

    Args:
        planner: Counts the run.
        card: The card that it is for; None compares all, and seconds are those of the first that
            it fits on.
        reached: Shares of that card's rate by phase, where they were measured.
    """

    def __init__(self, planner: Planner, card: Gpu | None, reached: Mapping[str, float]) -> None:
        self.planner, self.reached = planner, reached
        self.own = own = planner.forecast()
        cards = list(GPUS.values()) if card is None else [card]
        self.card = next((card for card in cards if own.fits(card)), cards[-1])
        self.cards = [self._compared(card) for card in cards]
        self.variants = [self._told(v.changes, v.forecast(planner)) for v in variants(planner)]

    def _compared(self, card: Gpu) -> dict[str, Any]:
        """Return whether the run fits on a card; if not, the change that helps and its hours."""
        change = None if self.own.fits(card) else remedy(self.planner, card)
        result = self.own if change is None else change.forecast(self.planner)
        return {
            "name": card.name,
            "memory": card.memory * GB,
            "fits": self.own.fits(card),
            "headroom": self.own.headroom(card),
            "gpu_hours": result.hours(card, self.reached if card is self.card else {}),
            "changes": None if change is None else change.changes,
        }

    def _told(self, changes: Sequence[str], result: Forecast) -> dict[str, Any]:
        return {
            "changes": changes,
            "peak": result.peak.peak,
            "phase": result.peak.name,
            "gpu_hours": result.hours(self.card, self.reached),
            "fits": result.fits(self.card),
        }

    def as_json(self) -> dict[str, Any]:
        """Return all numbers: bytes, operations, seconds, hours."""
        shares = {"half": EAGER, "float32": SINGLE, "measured": dict(self.reached)}
        return {
            "computed": True,
            "model": self.planner.shape.source,
            "geometry": asdict(self.planner.geometry),
            "judges": [asdict(judge) for judge in self.planner.judges],
            "card": asdict(self.card) | {"shares": shares, "reserve": RESERVE},
            "run": asdict(self.own),
            "cards": self.cards,
            "what_if": self.variants,
        }

    def text(self) -> str:
        """Return tables in Markdown, which a terminal shows as well."""
        name, own = self.card.name, self.own
        work = [["work of a card", "times", "TFLOP", "GB moved", f"s on {name}"], *self._work()]
        shares = ", ".join(f"{share:.0%} in {phase}" for phase, share in self.reached.items())
        cards = [["card", "GB", "fits", "GB left", "GPU-hours", "what to change"]]
        for row in self.cards:
            change = ", ".join(row["changes"] or ("" if row["fits"] else NONE_IS_ENOUGH,))
            sizes = _giga(row["memory"]), _yes(row["fits"]), _giga(row["headroom"])
            cards.append([row["name"], *sizes, _number(row["gpu_hours"]), change])
        others = [["what if", "peak GB", "in", f"GPU-hours on {name}", f"fits on {name}"]]
        for row in self.variants:
            label, peak = ", ".join(row["changes"]) or "as configured", _giga(row["peak"])
            others.append([label, peak, row["phase"], _number(row["gpu_hours"]), _yes(row["fits"])])
        parts = [
            f"Computed from the configuration, not measured: {self.planner.shape.source}. "
            f"{self._model()}",
            f"{self.planner.geometry.describe()}.",
            "\n".join(self._judges()),
            markdown(_memory(own)),
            markdown(work),
            f"Seconds are operations at {EAGER:.0%} of the card's rate, {SINGLE:.0%} in float32 "
            "(estimates for PyTorch without a compiler), or bytes at its bandwidth, whichever "
            f"takes longer{f'; measured: {shares}' if shares else ''}. Launching kernels is not "
            "counted, which passes of few samples wait for, nor is loading: that is the disk's.",
            f"Disk: {_listed(own.disk)}. Main memory of a process: {_listed(own.host)}.",
            markdown(cards),
            f"{_giga(RESERVE)} GB are kept for CUDA's context, workspaces and fragmentation. Hours "
            "are those after the change, where there is one.",
            markdown(others),
            self._last_line(),
        ]
        return "\n\n".join(part for part in parts if part)

    def _model(self) -> str:
        settings = self.planner.settings
        policy, side = settings.policy, settings.sampling.resolution
        cost = self.planner.transformer(side, policy.gradient_checkpointing)
        return (
            f"LoRA of rank {policy.lora.rank} in {cost.adapted} layers: {cost.trained / 1e6:.2f} M "
            f"numbers are trained. {policy.dtype}, VAE in {policy.vae_dtype}, {side} px."
        )

    def _judges(self) -> Iterator[str]:
        for judge in (*self.planner.judges, *self.planner.watching):
            counted = f"{judge.model}, {_giga(judge.weights)} GB" if judge.weights else ""
            work = f"{_number(judge.flops / TERA)} TFLOP per image" if judge.flops else ""
            told = ", ".join(part for part in (counted, work) if part)
            yield f"Reward {judge.name}: {'; '.join(p for p in (told, judge.note) if p)}."

    def _work(self) -> Iterator[list[str]]:
        for phase in self.own.phases:
            flops, moved = sum(w.flops for w in phase.work), sum(w.moved for w in phase.work)
            seconds = _number(phase.seconds(self.card, self.reached))
            numbers = _number(flops / TERA), _giga(moved), "" if phase.name == LOAD else seconds
            yield [phase.name, f"{phase.times:g}", *numbers]

    def _last_line(self) -> str:
        where = ", ".join(row["name"] for row in self.cards if row["fits"])
        unknown = [judge.name for judge in self.planner.judges if judge.partial]
        return (
            f"Fits on: {where or 'none of these cards as configured'}; about "
            f"{_number(self.own.hours(self.card, self.reached))} GPU-hours on {self.card.name}"
            f"{', without ' if unknown else ''}{', '.join(unknown)} (computed, not measured)."
        )


def _memory(own: Forecast) -> list[list[str]]:
    phases = own.phases
    parts = dict.fromkeys(part for phase in phases for part in phase.memory if phase.memory[part])
    rows = [["GB of a card", *(phase.name for phase in phases)]]
    rows += [[part, *(_giga(phase.memory.get(part, 0.0)) for phase in phases)] for part in parts]
    return [*rows, ["sum", *(_giga(phase.peak) for phase in phases)]]


def _listed(sizes: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_giga(size)} GB" for name, size in sizes.items() if size)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _giga(size: float) -> str:
    return _number(size / GB) if size else ""


def _number(value: float) -> str:
    """Return a number with two or three digits."""
    if abs(value) >= 10:
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 or not value else f"{value:.2g}"
