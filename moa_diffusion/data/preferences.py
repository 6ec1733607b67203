"""Which responses are better than which: win rates from pairs and from scores.

``preference_files.py`` reads them.

Win rate of response i, for one prompt and one objective::

    from pairs    (wins_i + smoothing) / (n_i + 2 smoothing)      n_i opponents it was compared with
    from scores   mean_{j != i} sigmoid((r_i - r_j) / scale)

Only pairs that were compared count, each pair once however often it is written. A response that
was compared with nothing has no win rate for that objective: NaN.

One label per response is too little: the win rate is then 0 or 1 where the truth is a probability
p, and MOPO's closed form, averaged over such labels, gives ``ref (1 + (e^{1/tau} - 1) p)`` where it
should give ``ref e^{p/tau}``. That is warned of. Our choice is to have no model of the preferences
in between (Bradley-Terry over features of the responses, say), since sets small enough to be
labelled by hand cannot feed one. ``smoothing`` is the cheap remedy: the posterior mean under a
Beta(smoothing, smoothing) prior draws single labels towards 1/2. It narrows the gap, does not
close it, and moves the scale that bounds are on; several opponents per response are better.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moa_diffusion.files.text import bad_line

logger = logging.getLogger(__name__)

SHOWN = 40  # characters of a response in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """Responses that are already there, and how often each beats the others of its prompt."""

    objectives: tuple[str, ...]  # length K
    prompts: tuple[str, ...]  # length P, distinct
    responses: tuple[tuple[str, ...], ...]  # length P; at least two each, distinct; Y the most
    metadata: tuple[Mapping[str, Any], ...]  # length P, further keys of the rows
    win_rates: Tensor  # [K, P, Y] float64 in [0, 1]; NaN: never compared, or padding
    log_data: Tensor  # [P, Y] float64, minus log of the prompt's responses; -inf: padding
    log_probs: Tensor | None = None  # [P, Y] float64, of whole responses under the policy that
    # wrote them; NaN: padding. None: that was the model that training starts from

    def rows(self) -> Tensor:
        """``[R, 2]`` int64, prompt and position of every response."""
        return (self.log_data > -math.inf).nonzero()

    def digest(self) -> str:
        """16 hexadecimal digits that change with any text, win rate or log-probability."""
        found = blake2b(digest_size=8)
        found.update(json.dumps([self.objectives, self.prompts, self.responses]).encode())
        for tensor in (self.win_rates, self.log_probs):
            if tensor is not None:
                found.update(tensor.contiguous().numpy().tobytes())
        return found.hexdigest()


def win_rates_of_pairs(
    pairs: Sequence[tuple[int, int]], responses: int, smoothing: float = 0.0
) -> Tensor:
    """Share of its opponents that each response beats: ``[Y]`` float64, NaN without opponents.

    Args:
        pairs: distinct (winner, loser), positions below ``responses``.
        responses: Y.
        smoothing: of the Beta prior; 0 for none.
    """
    places = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    wins = torch.bincount(places[:, 0], minlength=responses).double()
    opponents = torch.bincount(places.flatten(), minlength=responses).double()
    rate = (wins + smoothing) / (opponents + 2 * smoothing)
    return torch.where(opponents > 0, rate, math.nan)


def win_rates_of_scores(scores: Tensor, scale: float) -> Tensor:
    """Mean probability of beating each of the others: ``[Y]`` float64.

    Args:
        scores: ``[Y]``, NaN where there is none; the win rate is NaN there, and no opponent.
        scale: difference of scores that is worth odds of e; at 0 more is 1, less 0, equal 1/2.
    """
    r = scores.double()
    gap = r[:, None] - r  # [Y, Y]
    wins = torch.sigmoid(gap / scale) if scale > 0 else (gap.sign() + 1) / 2
    return torch.where(gap.isnan(), math.nan, wins).fill_diagonal_(math.nan).nanmean(1)


@dataclass(slots=True, kw_only=True)
class Draft:
    """What the files say of one prompt."""

    where: str  # file and line that it was first seen at
    prompt: str
    responses: list[str] = field(default_factory=list)
    pairs: dict[str, dict[tuple[int, int], None]] = field(default_factory=dict)  # in order
    scores: dict[str, Tensor] = field(default_factory=dict)  # [Y] each
    log_probs: Tensor | None = None  # [Y]
    metadata: dict[str, Any] = field(default_factory=dict)

    def prefer(self, where: str, objective: str, winner: int, loser: int, cycles: str) -> None:
        """Note a pair; a tie is refused, and a cycle unless it is to be kept."""
        pairs = self.pairs.setdefault(objective, {})
        if (loser, winner) in pairs:
            found = f"both orders of {self._named([winner, loser])}; leave a tie out"
            raise bad_line(where, f"A pair of `{objective}` should have one winner.", found)
        if cycles == "error" and (way := _way(pairs, loser, winner)):
            raise bad_line(
                where,
                f"Preferences of `{objective}` should not run in a circle.",
                f"{self._named([winner, *way])}. Take one of these pairs out, or keep such circles "
                "with `cycles: keep`",
            )
        pairs[winner, loser] = None

    def _named(self, positions: Sequence[int]) -> str:
        return " > ".join(f"{i} {shortened(self.responses[i])}" for i in positions)


def _way(pairs: Mapping[tuple[int, int], None], start: int, end: int) -> list[int]:
    """Positions from ``start`` to ``end`` along winners and losers; empty if there is no way."""
    before = {start: start}
    queue = [start]
    for here in queue:
        for loser in [second for first, second in pairs if first == here]:
            if loser not in before:
                before[loser] = here
                queue.append(loser)
    if end not in before:
        return []
    way = [end]
    while way[-1] != start:
        way.append(before[way[-1]])
    return way[::-1]


def assemble(
    files: Mapping[str, Path],
    drafts: Sequence[Draft],
    smoothing: float,
    scales: Mapping[str, float] | None,
) -> Preferences:
    """Win rates of all prompts, padded to the longest."""
    longest = max(len(draft.responses) for draft in drafts)
    win_rates = torch.full((len(files), len(drafts), longest), math.nan, dtype=torch.float64)
    log_data = torch.full((len(drafts), longest), -math.inf, dtype=torch.float64)
    for p, draft in enumerate(drafts):
        log_data[p, : len(draft.responses)] = -math.log(len(draft.responses))
    for k, name in enumerate(files):
        scale = (scales or {}).get(name, _spread(drafts, name) / 2)
        for p, draft in enumerate(drafts):
            count = len(draft.responses)
            if pairs := draft.pairs.get(name):
                win_rates[k, p, :count] = win_rates_of_pairs(list(pairs), count, smoothing)
            elif name in draft.scores:
                win_rates[k, p, :count] = win_rates_of_scores(draft.scores[name], scale)
        if win_rates[k].isnan().all():
            expectation = f"`{name}` should be compared at least once."
            raise bad_line(str(files[name]), expectation, "no pair and no two scores of it")
        _warn_of_single_labels(name, drafts, smoothing)
    silent = win_rates.isnan().flatten(2).all(2).all(0)  # [P]
    for p in silent.nonzero().flatten().tolist():
        expectation = "A line should compare its responses, by a pair or by two scores at least."
        raise bad_line(drafts[p].where, expectation, "neither")
    return Preferences(
        objectives=tuple(files),
        prompts=tuple(draft.prompt for draft in drafts),
        responses=tuple(tuple(draft.responses) for draft in drafts),
        metadata=tuple(draft.metadata for draft in drafts),
        win_rates=win_rates,
        log_data=log_data,
        log_probs=_behaviour(drafts, log_data),
    )


def _spread(drafts: Sequence[Draft], name: str) -> float:
    """RMS over the prompts of the scores' standard deviation within a prompt; 0 without scores."""
    scores = [draft.scores[name] for draft in drafts if name in draft.scores]
    centred = [values[~values.isnan()] - values.nanmean() for values in scores]
    squares = [float(values.square().mean()) for values in centred if len(values) > 1]
    return math.sqrt(sum(squares) / len(squares)) if squares else 0.0


def _warn_of_single_labels(name: str, drafts: Sequence[Draft], smoothing: float) -> None:
    labelled = [pairs for draft in drafts if (pairs := draft.pairs.get(name))]
    if (
        labelled
        and smoothing == 0
        and all(len({i for pair in pairs for i in pair}) == 2 * len(pairs) for pairs in labelled)
    ):
        logger.warning(
            "Objective `%s`: every response was compared with one other, so that its win rate is "
            "a single label, 0 or 1, and the tilt towards it is too strong. More responses per "
            "prompt help, or `smoothing` (1, say).",
            name,
        )


def _behaviour(drafts: Sequence[Draft], log_data: Tensor) -> Tensor | None:
    """Log-probabilities of the responses ``[P, Y]``, if the file has them."""
    if all(draft.log_probs is None for draft in drafts):
        return None
    found = torch.full_like(log_data, math.nan)
    for p, draft in enumerate(drafts):
        if draft.log_probs is None:
            expectation = "`log_probs` should be in all lines or in none."
            raise bad_line(draft.where, expectation, "none here")
        found[p, : len(draft.responses)] = draft.log_probs
    return found


def shortened(text: str) -> str:
    """The text, or its start, in quotes."""
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 3] + "...")
