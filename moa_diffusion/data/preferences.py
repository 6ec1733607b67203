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
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor


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
        """Return ``[R, 2]`` int64, prompt and position of every response."""
        return (self.log_data > -math.inf).nonzero()

    def digest(self) -> str:
        """Return 16 hexadecimal digits that change with any text, win rate or log-probability."""
        state = blake2b(digest_size=8)
        state.update(json.dumps([self.objectives, self.prompts, self.responses]).encode())
        for tensor in (self.win_rates, self.log_probs):
            if tensor is not None:
                state.update(tensor.contiguous().numpy().tobytes())
        return state.hexdigest()


def win_rates_of_pairs(
    pairs: Sequence[tuple[int, int]], responses: int, smoothing: float = 0.0
) -> Tensor:
    """Return the share of its opponents that each response beats: ``[Y]`` float64.

    It is NaN for a response without opponents.

    Args:
        pairs: Distinct (winner, loser), positions below ``responses``.
        responses: Number Y of responses.
        smoothing: The parameter of the Beta prior; 0 for none.
    """
    places = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    wins = torch.bincount(places[:, 0], minlength=responses).double()
    opponents = torch.bincount(places.flatten(), minlength=responses).double()
    rate = (wins + smoothing) / (opponents + 2 * smoothing)
    return torch.where(opponents > 0, rate, math.nan)


def win_rates_of_scores(scores: Tensor, scale: float) -> Tensor:
    """Return the mean probability of beating each of the others: ``[Y]`` float64.

    Args:
        scores: The responses' scores ``[Y]``, NaN where there is none; the win rate is NaN there,
            and no opponent.
        scale: Difference of scores that is worth odds of e; at 0 more is 1, less 0, equal 1/2.
    """
    r = scores.double()
    gap = r[:, None] - r  # [Y, Y]
    wins = torch.sigmoid(gap / scale) if scale > 0 else (gap.sign() + 1) / 2
    return torch.where(gap.isnan(), math.nan, wins).fill_diagonal_(math.nan).nanmean(1)
