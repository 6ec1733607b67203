"""An evaluation in numbers: means, gains over the base model, the front."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch

from moa_diffusion.files.json_values import without_nan
from moa_diffusion.files.writing import write_text
from moa_diffusion.report.markdown import markdown
from moa_diffusion.report.table import Table
from moa_diffusion.statistics.bootstrap import (
    LEVEL,
    RESAMPLES,
    Array,
    Estimate,
    estimate_one,
    prompt_sums,
    resample,
    resampled_means,
)
from moa_diffusion.statistics.groups import same_prompt, spread_within
from moa_diffusion.statistics.pareto import hypervolumes, nondominated


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSummary:
    """One reward of one model."""

    mean: Estimate  # over the samples it applies to
    gain: Estimate  # over the base model's sample of the same prompt and seed, in the reward's unit
    gain_in_stds: Estimate  # in the base model's standard deviations within a prompt
    # Share of the samples that score more than the base model's of the same prompt and seed; ties
    # count half. 0.5 is no difference, also of the base model itself.
    win_rate: Estimate
    improved: float  # share of the prompts whose mean is above the base model's; NaN: none
    samples: int  # it applies to


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSummary:
    """One model."""

    label: str
    series: str
    rewards: Mapping[str, RewardSummary]
    hypervolume: Estimate  # between it and the base model, in standard deviations
    nondominated: bool  # among all models, in the means of all rewards that apply


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Everything that ``summary.md`` says."""

    models: tuple[ModelSummary, ...]  # the base model first
    series: Mapping[str, Estimate]  # hypervolume of all models of a run or soup together
    together: Estimate  # hypervolume of all models together
    units: Mapping[str, float]  # the base model's standard deviation within a prompt; NaN: none
    volume_of: tuple[str, ...]  # rewards that hypervolumes are of: those that vary


def summarise(table: Table, *, resamples: int = RESAMPLES, seed: int = 0) -> Summary:
    """Return the statistics of a table; intervals are percentiles of a bootstrap over prompts.

    The same prompts are drawn for all models, and the unit of gains stays that of all prompts. A
    prompt that the table holds twice is one prompt.

    Args:
        table: The table of E models, the base model first.
        resamples: The number of resamples of the bootstrap.
        seed: The seed of the bootstrap.
    """
    models, rewards, prompts, seeds = table.values.shape
    values = table.values.reshape(models, rewards, prompts * seeds)  # [E, K, M]
    owner = same_prompt(table.prompts).repeat_interleave(seeds).numpy()  # [M]
    units = base_spread(table)  # [K]
    distinct = len(set(table.prompts))
    draws = resample(distinct, resamples=resamples, seed=seed)
    everyone = numpy.ones((1, distinct))

    def means(samples: Array) -> tuple[Array, Array]:
        sums = prompt_sums(samples, owner)
        return resampled_means(*sums, everyone)[0], resampled_means(*sums, draws)

    mean, mean_again = means(values)  # [E, K], [B, E, K]
    gain, gain_again = means(values - values[:1])
    win, win_again = means((numpy.sign(values - values[:1]) + 1) / 2)
    stds, stds_again = gain / units, gain_again / units
    varied = [k for k in range(rewards) if units[k] > 0 and not numpy.isnan(mean[:, k]).any()]

    def volume(chosen: Sequence[int]) -> Estimate:
        if not varied:
            return Estimate(value=math.nan, low=math.nan, high=math.nan)
        points = stds[None, chosen][:, :, varied]
        again = stds_again[:, chosen][:, :, varied]
        return estimate_one(float(hypervolumes(points)[0]), hypervolumes(again))

    front = nondominated(torch.from_numpy(mean))
    sums, counts = prompt_sums(values, owner)  # [E, K, P]
    averages = numpy.divide(sums, counts, out=numpy.full_like(sums, math.nan), where=counts > 0)
    series: dict[str, list[int]] = {}
    for e, model in enumerate(table.models):
        if model.series:
            series.setdefault(model.series, []).append(e)
    return Summary(
        models=tuple(
            ModelSummary(
                label=model.label,
                series=model.series,
                rewards={
                    name: RewardSummary(
                        mean=estimate_one(mean[e, k], mean_again[:, e, k]),
                        gain=estimate_one(gain[e, k], gain_again[:, e, k]),
                        gain_in_stds=estimate_one(stds[e, k], stds_again[:, e, k]),
                        win_rate=estimate_one(win[e, k], win_again[:, e, k]),
                        improved=_improved(averages[e, k], averages[0, k]),
                        samples=int(counts[e, k].sum()),
                    )
                    for k, name in enumerate(table.rewards)
                },
                hypervolume=volume([e]),
                nondominated=front[e],
            )
            for e, model in enumerate(table.models)
        ),
        series={name: volume(members) for name, members in series.items()},
        together=volume(range(models)),
        units=dict(zip(table.rewards, units.tolist(), strict=True)),
        volume_of=tuple(table.rewards[k] for k in varied),
    )


def worst_gain(model: ModelSummary, summary: Summary) -> tuple[str, float] | None:
    """Return name and size, in stds, of a model's smallest gain; None where nothing varies."""
    gains = {name: model.rewards[name].gain_in_stds.value for name in summary.volume_of}
    return min(gains.items(), key=lambda pair: pair[1]) if gains else None


def best_of(models: Sequence[int], summary: Summary) -> int:
    """Return the model with the largest worst gain; the last, where there are no stds."""
    if not summary.volume_of:
        return models[-1]

    def size(e: int) -> float:
        worst = worst_gain(summary.models[e], summary)
        return -math.inf if worst is None else worst[1]

    return max(models, key=size)


def last_of(table: Table, models: Sequence[int]) -> list[int]:
    """Return the last model of a run's; none of a soup, whose order is none of training."""
    return [e for e in models[-1:] if table.models[e].step is not None]


def members(table: Table, series: str) -> list[int]:
    """Return the places of a series' models in a table, in order."""
    return [e for e, model in enumerate(table.models) if model.series == series]


def base_spread(table: Table) -> Array:
    """Return the base model's standard deviation within a prompt, of every reward: ``[K]``.

    The unit of gains, see ``spread_within``. NaN where there is one seed, or where a reward does
    not vary within any prompt.
    """
    _, rewards, prompts, seeds = table.values.shape
    values = torch.from_numpy(table.values[0].reshape(rewards, prompts * seeds))
    siblings = torch.arange(prompts).repeat_interleave(seeds)
    spread: Array = spread_within(values, siblings).numpy()
    return numpy.where(spread > 0, spread, math.nan)


def _improved(means: Array, base: Array) -> float:
    """Return the share of prompts ``[P]``, of those with a score, whose samples score more."""
    applies = ~numpy.isnan(means - base)
    return float((means > base)[applies].mean()) if applies.any() else math.nan


# ---------------------------------------------------------------------- writing


def write_summary(table: Table, folder: Path) -> Summary:
    """Write ``summary.md``, and ``summary.json`` with the same numbers unrounded."""
    summary = summarise(table)
    write_text(folder / "summary.md", text(table, summary))
    plain = json.dumps(without_nan(asdict(summary)), indent=2, allow_nan=False)
    write_text(folder / "summary.json", plain + "\n")
    return summary


def text(table: Table, summary: Summary) -> str:
    """Return the summary in Markdown."""
    one, several = ("image", "images") if table.texts is None else ("completion", "completions")
    parts = [
        "# Evaluation",
        _overview(table, summary),
        f"{len(table.models)} models, {len(table.prompts)} prompts, {len(table.seeds)} {several} "
        f"each (seeds {', '.join(map(str, table.seeds))}); {drawn(table)}.",
        f"In brackets {LEVEL:.0%} bootstrap intervals over prompts. A gain is the mean difference "
        f"to the base model's {one} of the same prompt and seed; std is the base model's standard "
        f"deviation within a prompt. Won: {several} that score more than the base model's of the "
        "same prompt and seed, ties half. The best checkpoint is that of the largest worst gain, "
        f"chosen on these prompts. Improved: prompts whose {several} score more on average than "
        "the base model's.",
    ]
    for name in table.rewards:
        unit, spread = table.units[name], summary.units[name]
        parts.append(f"## {name}{f' ({unit})' if unit else ''}")
        if summary.models[0].rewards[name].samples == 0:
            parts.append("Applies to none of the prompts.")
            continue
        rows = [["checkpoint", "mean", "gain", "gain in stds", "improved", several]]
        for model in summary.models:
            result = model.rewards[name]
            base = model is summary.models[0]
            rows.append(
                [
                    model.label,
                    result.mean.text(".4g"),
                    "-" if base else result.gain.text("+.4g"),
                    "-" if base else result.gain_in_stds.text("+.2f"),
                    "-" if base or math.isnan(result.improved) else f"{result.improved:.0%}",
                    str(result.samples),
                ]
            )
        parts.append(markdown(rows))
        if math.isnan(spread):
            parts.append("The base model does not vary within any prompt, so there is no std.")
        else:
            parts.append(f"One std is {spread:.4g}.")
    parts += ["## Front", *_front(table, summary)]
    return "\n\n".join(parts) + "\n"


def _overview(table: Table, summary: Summary) -> str:
    """Return the table that says which checkpoint to take: the best and the last of each series."""
    rows = [["", "model", *table.rewards, "worst gain"]]
    for series in summary.series:
        mine = members(table, series)
        best, last = best_of(mine, summary), last_of(table, mine)
        for e in dict.fromkeys((best, *last)):
            words = [word for word, is_so in (("best", e == best), ("last", e in last)) if is_so]
            model = summary.models[e]
            worst = worst_gain(model, summary)
            rows.append(
                [
                    " and ".join(words) if len(mine) > 1 else "",
                    model.label,
                    *(_gained(model.rewards[name]) for name in table.rewards),
                    "-" if worst is None else f"{worst[1]:+.2f} ({worst[0]})",
                ]
            )
    if len(rows) == 1:
        return "Only the base model was evaluated."
    return markdown(rows)


def _gained(one: RewardSummary) -> str:
    """Return a gain, in stds where there are any, and how often it is one."""
    if one.samples == 0:
        return "-"
    known = not math.isnan(one.gain_in_stds.value)
    gain = one.gain_in_stds.text("+.2f") if known else one.gain.text("+.4g")
    return f"{gain}, won {one.win_rate.value:.0%}"


def drawn(table: Table) -> str:
    """Return how its samples were drawn, in words."""
    sampler = table.sampler
    if table.texts is None:
        return (
            f"deterministic, {sampler['steps']} steps, guidance {sampler['guidance']:g}, "
            f"{sampler['resolution']} x {sampler['resolution']} pixels, {sampler['dtype']}"
        )
    warmth = sampler["temperature"]
    tokens = f"temperature {warmth:g}" if warmth > 0 else "the likeliest tokens"
    return f"{tokens}, at most {sampler['max_new_tokens']} tokens, {sampler['dtype']}"


def _front(table: Table, summary: Summary) -> list[str]:
    rows = [["checkpoint", "worst gain in stds", "hypervolume", "non-dominated"]]
    for model in summary.models:
        gains = [model.rewards[name].gain_in_stds.value for name in summary.volume_of]
        base = model is summary.models[0]
        rows.append(
            [
                model.label,
                f"{min(gains):+.2f}" if gains and not base else "-",
                "-" if base else model.hypervolume.text(".4g"),
                "yes" if model.nondominated else "no",
            ]
        )
    volumes = [["models", "hypervolume"]]
    volumes += [[name, volume.text(".4g")] for name, volume in summary.series.items()]
    volumes.append(["all", summary.together.text(".4g")])
    parts = [markdown(rows), markdown(volumes)]
    left_out = [name for name in table.rewards if name not in summary.volume_of]
    parts.append(
        "Hypervolumes are in stds, between the base model and what is dominated; a model below the "
        "base model in one reward has none"
        + (f". Not in them: {', '.join(left_out)}." if left_out else ".")
    )
    return parts
