"""What a reader in a hurry wants to know: did it work, what to take, what did it cost."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moa_diffusion.files import program
from moa_diffusion.report.page.runs import Training
from moa_diffusion.report.summary import (
    ModelSummary,
    Summary,
    best_of,
    last_of,
    members,
    worst_gain,
)
from moa_diffusion.report.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """One reward of one model against the base model."""

    name: str
    heldout: bool  # not trained on
    text: str  # with its interval
    won: str  # the win rate
    won_within: str  # its interval
    sign: str  # "up" or "down" where the interval leaves 0 out, else "open"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One model of a series, with its gains."""

    role: str  # why it is shown: "best", "last" or both
    model: int  # place in the table
    label: str
    worst: str | None  # "+0.12 (ocr)"; None: no stds
    sign: str  # the worst gain's sign, as the page's style names it
    gains: tuple[Gain, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One series."""

    series: str
    # The model with the largest worst gain, and the last one if that is another: of a run that
    # collapsed the best alone would look well.
    shown: tuple[Shown, ...]
    answer: str  # whether it worked, in a sentence
    sign: str  # "up", "down" or "open"
    warning: str  # what the last model has lost since the best; empty: nothing
    command: str | None  # that exports the best model; None: it is no run's checkpoint
    cost: str  # of the training; empty: not a run
    alarms: int | None  # None: not a run

    @property
    def best(self) -> Shown:
        """The model to take."""
        return self.shown[0]


def cards(
    table: Table,
    summary: Summary,
    runs: Mapping[str, Training],
    folders: Mapping[str, Path],
    evaluation: Path,
) -> list[Card]:
    """Return a card per series, in the table's order.

    Args:
        table: The scores, whose rewards have names and units.
        summary: The gains of each model, with their intervals.
        runs: What is known of the training of a series, by its name.
        folders: Folders of these runs.
        evaluation: The folder of the table.
    """
    chosen = {
        name: list(dict.fromkeys((best_of(mine, summary), *last_of(table, mine))))
        for name in summary.series
        if (mine := members(table, name))
    }
    made = []
    for name, places in chosen.items():
        heldout = runs[name].heldout if name in runs else ()
        mine = members(table, name)
        both = "best and last" if len(mine) > 1 and places == last_of(table, mine) else "best"
        roles = ("best", "last") if len(places) > 1 else (both if len(mine) > 1 else "",)
        shown = tuple(
            _shown(table, summary, e, role, heldout) for role, e in zip(roles, places, strict=True)
        )
        answer, sign = _answer(shown[0])
        made.append(
            Card(
                series=name,
                shown=shown,
                answer=answer,
                sign=sign,
                warning=_warning(*shown) if len(shown) > 1 else "",
                command=export_command(table, places[0], folders, evaluation),
                cost=_cost(runs[name]) if name in runs else "",
                alarms=len(runs[name].alarms) if name in runs else None,
            )
        )
    return made


def export_command(
    table: Table, e: int, folders: Mapping[str, Path], evaluation: Path
) -> str | None:
    """Return the command that exports a model; None where it is no run's checkpoint or soup.

    Args:
        table: The table of E models.
        e: The model's place in it.
        folders: Folders of runs by series.
        evaluation: The folder of the table, whose scores the model card has.
    """
    model = table.models[e]
    weights = {model.label: 1.0} if model.weights is None else model.weights
    by_label = {one.label: one for one in table.models}
    parts = [by_label[label] for label in weights if label in by_label]
    steps = {one.step for one in parts}
    known = all(one.series in folders and one.step is not None for one in parts)
    if len(parts) < len(weights) or not known or len(steps) != 1:
        return None
    words = shlex.split(program.words("export"))
    for one in parts:
        folder = str(folders[one.series])
        words += ["--run", folder if len(parts) == 1 else f"{one.series}={folder}"]
    words += ["--checkpoint", f"step-{steps.pop()}"]
    if len(parts) > 1:
        words += ["--weights", ",".join(str(weight) for weight in weights.values())]
    if model.ema is False:
        words.append("--no-ema")
    target = folders[parts[0].series] / "exported" if len(parts) == 1 else Path("exported")
    words += ["--output", str(target), "--evaluation", str(evaluation)]
    return shlex.join(words)


def _shown(table: Table, summary: Summary, e: int, role: str, heldout: Sequence[str]) -> Shown:
    model = summary.models[e]
    worst = worst_gain(model, summary)
    gains = tuple(
        _gain(table, model, reward, heldout=reward in heldout) for reward in table.rewards
    )
    return Shown(
        role=role,
        model=e,
        label=model.label,
        worst=None if worst is None else f"{worst[1]:+.2f} ({worst[0]})",
        sign=next((one.sign for one in gains if worst and one.name == worst[0]), "open"),
        gains=gains,
    )


def _answer(best: Shown) -> tuple[str, str]:
    """Return whether a model is better than the base model, in a sentence, and its sign."""
    better = [one.name for one in best.gains if one.sign == "up"]
    worse = [one.name for one in best.gains if one.sign == "down"]
    if better and worse:
        return f"{best.label} is better in {_list(better)}, but worse in {_list(worse)}.", "open"
    if better:
        return f"{best.label} is better in {_list(better)}, and worse in none.", "up"
    if worse:
        return f"{best.label} is worse in {_list(worse)}, and better in none.", "down"
    return f"{best.label} does not differ from the base model beyond noise.", "open"


def _warning(best: Shown, last: Shown) -> str:
    """Return what the last model has lost against the base model, which the best has not."""
    before = [one.name for one in best.gains if one.sign == "down"]
    lost = [one.name for one in last.gains if one.sign == "down" and one.name not in before]
    return f"The last one, {last.label}, is worse in {_list(lost)}." if lost else ""


def _list(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _cost(run: Training) -> str:
    minutes, seconds = divmod(round(run.seconds), 60)
    hours, minutes = divmod(minutes, 60)
    time = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
    return f"{run.rollouts} rollouts in {time}, evaluations included"


def _gain(table: Table, model: ModelSummary, reward: str, *, heldout: bool) -> Gain:
    one = model.rewards[reward]
    stds, raw = one.gain_in_stds, one.gain
    known = stds if math.isfinite(stds.value) else raw
    applies = math.isfinite(known.value)
    text = stds.text("+.2f") if known is stds else f"{raw.text('+.4g')} {table.units[reward]}"
    return Gain(
        name=reward,
        heldout=heldout,
        text=text if applies else "does not apply",
        won=f"{one.win_rate.value:.0%}" if applies else "",
        won_within=f"[{one.win_rate.low:.0%}, {one.win_rate.high:.0%}]" if applies else "",
        sign="up" if known.low > 0 else "down" if known.high < 0 else "open",
    )
