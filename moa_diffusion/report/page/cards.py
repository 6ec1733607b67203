"""What a reader in a hurry wants to know: of each run or soup, the checkpoint to look at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moa_diffusion.report.page.runs import Training
from moa_diffusion.report.summary import ModelSummary, Summary
from moa_diffusion.report.table import Table
from moa_diffusion.statistics.bootstrap import Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """One reward of one model against the base model."""

    name: str
    heldout: bool  # not trained on
    text: str  # with its interval
    sign: str  # "up" or "down" where the interval leaves 0 out, else "open"
    bar: tuple[float, float, float] | None  # value, low, high: percent of the width, 50 is the base


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One series."""

    series: str
    model: int  # the one with the largest worst gain; the last, where there are no stds
    label: str
    worst: str | None  # "+0.12 (ocr)"; None: no stds
    sign: str  # the worst gain's sign, as the page's style names it
    gains: tuple[Gain, ...]
    hypervolume: str | None  # the whole series' volume; None: nothing varies
    alarms: int | None  # None: not a run


def cards(table: Table, summary: Summary, runs: Mapping[str, Training]) -> list[Card]:
    """Return a card per series, in the table's order.

    Args:
        table: The scores, whose rewards have names and units.
        summary: The gains of each model, with their intervals.
        runs: What is known of the training of a series, by its name.
    """
    chosen = {name: _chosen(table, summary, name) for name in summary.series}
    shown = [one for e in chosen.values() for one in summary.models[e].rewards.values()]
    ends = [abs(end) for one in shown for end in (one.gain_in_stds.low, one.gain_in_stds.high)]
    reach = max((end for end in ends if math.isfinite(end)), default=0.0)
    headlines = []
    for name, e in chosen.items():
        model = summary.models[e]
        worst = worst_gain(model, summary)
        heldout = runs[name].heldout if name in runs else ()
        gains = tuple(
            _gain(table, model, reward, reach, heldout=reward in heldout)
            for reward in table.rewards
        )
        headlines.append(
            Card(
                series=name,
                model=e,
                label=model.label,
                worst=None if worst is None else f"{worst[1]:+.2f} ({worst[0]})",
                sign=next((g.sign for g in gains if worst and g.name == worst[0]), "open"),
                gains=gains,
                hypervolume=summary.series[name].text(".3g") if summary.volume_of else None,
                alarms=len(runs[name].alarms) if name in runs else None,
            )
        )
    return headlines


def worst_gain(model: ModelSummary, summary: Summary) -> tuple[str, float] | None:
    """Return name and size, in stds, of a model's smallest gain; None where nothing varies."""
    gains = {name: model.rewards[name].gain_in_stds.value for name in summary.volume_of}
    return min(gains.items(), key=lambda pair: pair[1]) if gains else None


def _chosen(table: Table, summary: Summary, series: str) -> int:
    members = [e for e, model in enumerate(table.models) if model.series == series]
    if not summary.volume_of:
        return members[-1]

    def size(e: int) -> float:
        worst = worst_gain(summary.models[e], summary)
        return -math.inf if worst is None else worst[1]

    return max(members, key=size)


def _gain(table: Table, model: ModelSummary, reward: str, reach: float, *, heldout: bool) -> Gain:
    one = model.rewards[reward]
    stds, raw = one.gain_in_stds, one.gain
    known = stds if math.isfinite(stds.value) else raw
    sign = "up" if known.low > 0 else "down" if known.high < 0 else "open"
    if known is raw:
        unit = table.units[reward]
        return Gain(
            name=reward,
            heldout=heldout,
            text=f"{raw.text('+.4g')} {unit}" if math.isfinite(raw.value) else "does not apply",
            sign=sign,
            bar=None,
        )
    return Gain(
        name=reward,
        heldout=heldout,
        text=stds.text("+.2f"),
        sign=sign,
        bar=_bar(stds, reach),
    )


def _bar(one: Estimate, reach: float) -> tuple[float, float, float] | None:
    if reach == 0:
        return None
    value, low, high = (round(50 + 48 * end / reach, 2) for end in (one.value, one.low, one.high))
    return value, low, high
