"""A plan as tables, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moa_diffusion.planning.forecast import EAGER, RESERVE, SINGLE, Forecast, Phase
from moa_diffusion.planning.gpus import GPUS, Gpu
from moa_diffusion.planning.planner import LOAD, Planner
from moa_diffusion.planning.variants import remedy, variants
from moa_diffusion.report.markdown import markdown

GB, TERA = 1e9, 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is told of a run.

    Args:
        planner: Counts the run.
        cards: The cards that it is compared with.
        timed: The card whose seconds are shown.
        reached: Share of that card's rate by phase, where it was measured.
    """

    planner: Planner
    cards: tuple[Gpu, ...]
    timed: Gpu
    reached: Mapping[str, float]

    @classmethod
    def of(cls, planner: Planner, card: Gpu | None, reached: Mapping[str, float]) -> Plan:
        """Return the plan for a card, or for all; then seconds are those of the first that fits."""
        if card is not None:
            return cls(planner=planner, cards=(card,), timed=card, reached=reached)
        own, cards = planner.forecast(), tuple(GPUS.values())
        timed = next((card for card in cards if own.fits(card)), cards[-1])
        return cls(planner=planner, cards=cards, timed=timed, reached={})

    def text(self) -> str:
        """Return the tables, in Markdown, which a terminal shows as well."""
        own = self.planner.forecast()
        parts = [
            "Computed from the configuration, not measured: "
            f"{self.planner.shape.source}. {self._model()}",
            f"{self.planner.geometry.describe()}.",
            "\n".join(self._judges()),
            _memory_table(own),
            self._work_table(own),
            _machine(own),
            self._card_table(own),
            self._variants_table(),
            self._last_line(own),
        ]
        return "\n\n".join(part for part in parts if part)

    def as_json(self) -> dict[str, Any]:
        """Return all numbers; bytes, operations and seconds, computed unless they say otherwise."""
        own = self.planner.forecast()
        return {
            "computed": True,
            "model": self.planner.shape.source,
            "geometry": asdict(self.planner.geometry),
            "trained": self._cost.trained,
            "judges": [asdict(judge) for judge in self.planner.judges],
            "card": asdict(self.timed),
            "utilisation": {"default": EAGER, "float32": SINGLE, "measured": dict(self.reached)},
            "reserve": RESERVE,
            "phases": [
                asdict(phase) | {"peak": phase.peak, "seconds": self._seconds(phase)}
                for phase in own.phases
            ],
            "disk": own.disk,
            "host": own.host,
            "cards": [
                {
                    "name": card.name,
                    "fits": own.fits(card),
                    "headroom": own.headroom(card),
                    "gpu_hours": own.hours(card, self._reached(card)),
                }
                for card in self.cards
            ],
            "what_if": [
                {
                    "changes": variant.changes,
                    "peak": (result := variant.forecast(self.planner)).peak.peak,
                    "phase": result.peak.name,
                    "gpu_hours": result.hours(self.timed, self.reached),
                }
                for variant in variants(self.planner)
            ],
        }

    @property
    def _cost(self) -> Any:
        settings = self.planner.settings
        return self.planner.transformer(
            settings.sampling.resolution, settings.policy.gradient_checkpointing
        )

    def _model(self) -> str:
        policy, cost = self.planner.settings.policy, self._cost
        return (
            f"LoRA of rank {policy.lora.rank} in {cost.adapted} layers: {cost.trained / 1e6:.2f} M "
            f"numbers are trained. {policy.dtype}, VAE in {policy.vae_dtype}, "
            f"{self.planner.settings.sampling.resolution} px."
        )

    def _judges(self) -> Iterator[str]:
        for judge in (*self.planner.judges, *self.planner.watching):
            counted = f"{judge.model}, {_number(judge.weights / GB)} GB" if judge.weights else ""
            work = f"{_number(judge.flops / TERA)} TFLOP per picture" if judge.flops else ""
            told = ", ".join(part for part in (counted, work) if part)
            yield f"Reward {judge.name}: {'; '.join(p for p in (told, judge.note) if p)}."

    def _reached(self, card: Gpu) -> Mapping[str, float]:
        return self.reached if card is self.timed else {}

    def _seconds(self, phase: Phase) -> float:
        return phase.seconds(self.timed, self.reached)

    def _work_table(self, own: Forecast) -> str:
        rows = [["work of a card", "times", "TFLOP", "GB moved", f"s on {self.timed.name}"]]
        for phase in own.phases:
            if phase.work and phase.times:
                flops, moved = (
                    sum(values)
                    for values in zip(*((w.flops, w.moved) for w in phase.work), strict=True)
                )
                seconds = "" if phase.name == LOAD else _number(self._seconds(phase))
                numbers = _number(flops / TERA), _number(moved / GB), seconds
                rows.append([phase.name, f"{phase.times:g}", *numbers])
        shares = ", ".join(f"{share:.0%} in {name}" for name, share in self.reached.items())
        note = (
            f"Seconds are operations at {EAGER:.0%} of the card's rate, {SINGLE:.0%} in float32 "
            "(estimates for PyTorch without a compiler), or bytes at its bandwidth, whichever "
            "takes longer. Launching kernels is not counted, which passes of few samples wait for, "
            "nor is loading, which depends on the disk"
        )
        return f"{markdown(rows)}\n\n{note}{f'; measured: {shares}' if shares else ''}."

    def _card_table(self, own: Forecast) -> str:
        rows = [["card", "GB", "fits", "GB left", "GPU-hours", "what to change"]]
        for card in self.cards:
            fits, hours, change = own.fits(card), own.hours(card, self._reached(card)), ""
            if not fits:
                variant = remedy(self.planner, card)
                if variant is None:
                    change = "none of the settings below is enough"
                else:
                    change = ", ".join(variant.changes)
                    hours = variant.forecast(self.planner).hours(card, self._reached(card))
            left, verdict = _number(own.headroom(card) / GB), "yes" if fits else "no"
            rows.append([card.name, f"{card.memory:g}", verdict, left, _number(hours), change])
        note = f"{RESERVE / GB:g} GB are kept for CUDA's context, workspaces and fragmentation."
        return f"{markdown(rows)}\n\n{note} Hours are those after the change, where there is one."

    def _variants_table(self) -> str:
        name = self.timed.name
        rows = [["what if", "peak GB", "in", f"GPU-hours on {name}", f"fits on {name}"]]
        for variant in variants(self.planner):
            result = variant.forecast(self.planner)
            hours = _number(result.hours(self.timed, self.reached))
            fits = "yes" if result.fits(self.timed) else "no"
            label = ", ".join(variant.changes) or "as configured"
            rows.append([label, _number(result.peak.peak / GB), result.peak.name, hours, fits])
        return markdown(rows)

    def _last_line(self, own: Forecast) -> str:
        fitting = [card.name for card in self.cards if own.fits(card)]
        hours = own.hours(self.timed, self.reached)
        unknown = [judge.name for judge in self.planner.judges if "unknown" in judge.note]
        without = f", without {', '.join(unknown)}" if unknown else ""
        where = ", ".join(fitting) or "none of these cards"
        return (
            f"Fits on: {where}; about {_number(hours)} GPU-hours "
            f"on {self.timed.name}{without} (computed, not measured)."
        )


def _memory_table(own: Forecast) -> str:
    parts = list(dict.fromkeys(part for phase in own.phases for part in phase.memory))
    parts = [p for p in parts if any(phase.memory.get(p) for phase in own.phases)]
    rows = [["GB of a card", *(phase.name for phase in own.phases)]]
    for part in parts:
        sizes = (phase.memory.get(part, 0.0) for phase in own.phases)
        rows.append([part, *(_number(size / GB) if size else "" for size in sizes)])
    return markdown([*rows, ["sum", *(_number(phase.peak / GB) for phase in own.phases)]])


def _machine(own: Forecast) -> str:
    disk = ", ".join(f"{name} {_number(size / GB)} GB" for name, size in own.disk.items() if size)
    host = ", ".join(f"{name} {_number(size / GB)} GB" for name, size in own.host.items())
    return f"Disk: {disk}. Main memory of a process: {host}."


def _number(value: float) -> str:
    """Return a number with two or three digits."""
    if abs(value) >= 10:
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 or not value else f"{value:.2g}"
