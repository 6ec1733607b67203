"""Weights from the objectives' gradients, by any Gramian method of TorchJD (arXiv 2406.16232).

With the policy gradients ``g_k`` as rows of ``J``, methods such as MGDA, PCGrad, CAGrad, Nash-MTL,
Aligned-MTL and UPGrad answer with ``sum_k w_k g_k`` where ``w`` depends on ``G = J J'`` alone::

    G <- G / mean_k G_kk,   w = method(G)

so the scale of the loss drops out and ``J`` is never needed. https://torchjd.org documents each
method and its options; TorchJD's own code solves it.

Deviations: an objective without a gradient is left out of the solve and has weight 0. Nash-MTL is
solved from its cold start on every call (TorchJD starts where the last solve ended), so that
nothing is remembered. PCGrad's random order is drawn per rollout from a seed. Where a method
answers "do not move" with zero weights, they are the min-norm ones, whose direction is as good as
zero: ``combine`` sees ratios of weights, not their size.
"""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moa_diffusion.objectives.base import Weighting
from moa_diffusion.objectives.pama import min_norm_weights
from moa_diffusion.types import ObjectiveStats
from rewards.suggestions import did_you_mean

if TYPE_CHECKING:
    from torchjd.aggregation import Aggregator

_log = logging.getLogger(__name__)

# Relative to the largest squared gradient norm: what is smaller is nothing but rounding.
SILENT = 1e-24

# TorchJD offers these over Jacobians only; they see no more of one than its Gramian.
FROM_FACTOR = ("config", "mean", "nashmtl", "random", "sum")
SHUFFLED = ("pcgrad", "random")  # draw from the global generator
REFUSED = {
    "constant": "it ignores the gradients; the weighting `Static` takes weights of its own",
    "excessmtl": "it looks at single coordinates of the gradients and remembers them",
    "graddrop": "it looks at single coordinates of the gradients, not at their Gramian",
    "gradvac": "it remembers similarities between calls",
    "krum": "it votes among many workers, and fails where an objective has no gradient",
    "pcd": "it remembers gradient norms between calls",
    "trimmedmean": "it looks at single coordinates of the gradients, not at their Gramian",
}


class Gradient(Weighting):
    """Weights ``[K]`` by a method of TorchJD; some methods give negative ones.

    Args:
        objectives: Names of the K objectives.
        weights: K positive numbers, the importance of each objective; equal by default. They are
            TorchJD's preference vector, for the methods that have one.
        aggregator: TorchJD's name, in any case and with any separators: ``upgrad``, ``mgda``,
            ``pcgrad``, ``cagrad``, ``nash_mtl``, ``aligned-mtl``, ``IMTLG``, ``dualproj`` ...
        options: Options of TorchJD's constructor, such as ``{"c": 0.4}`` for CAGrad;
            ``pref_vector`` is a list with one entry per objective, in the place of ``weights``.

    Raises:
        ImportError: If torchjd, or a solver that the method needs, is not installed.
        ValueError: For an unknown or refused method, or options that it does not take.
    """

    needs_gramian = True
    from_gramian_alone = True

    def __init__(
        self,
        objectives: Sequence[str],
        *,
        weights: Sequence[float] | None = None,
        aggregator: str = "upgrad",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(objectives)
        self.name = _plain(aggregator)
        self._kind = find_aggregator(aggregator)
        self._options = dict(options or {})
        self._preference = self._options.pop("pref_vector", None)
        if weights is not None and len(set(weights)) > 1:
            self._prefer(weights)
        if self._options.get("update_weights_every", 1) != 1:
            raise ValueError(
                "Parameter `options` should leave `update_weights_every` at 1, since nothing is "
                f"remembered between calls. Found {self._options['update_weights_every']}."
            )
        if self._preference is not None and len(self._preference) != len(self.objectives):
            raise ValueError(
                "Parameter `options` should have one entry of `pref_vector` per objective "
                f"{self.objectives}. Found {list(self._preference)}."
            )
        # So that what a shuffled method draws belongs to an objective, not to a place in the list.
        by_name = sorted(range(len(self.objectives)), key=lambda k: self.objectives[k])
        self._order = by_name if self.name in SHUFFLED else list(range(len(self.objectives)))
        self._fallbacks = 0.0
        self._try()

    def forward(self, stats: ObjectiveStats) -> Tensor:
        """Return the aggregator's weights ``[K]`` for the Gramian; 0 for a gradient of 0."""
        if stats.gramian is None:
            raise ValueError("Parameter `stats` should have a `gramian`. Found None.")
        G = stats.gramian.double()  # [K, K]
        if not G.isfinite().all():
            raise ValueError(f"The Gramian should be finite. Found {G.tolist()}.")
        norms = G.diagonal()
        weights = torch.zeros_like(norms)
        kept = [k for k in self._order if norms[k] > SILENT * norms.max()]
        self._fallbacks = 0.0
        if not kept:
            return torch.full_like(weights, 1 / len(weights))
        G = G[kept][:, kept] / norms[kept].mean()  # [kept, kept]
        w = self._solve((G + G.T) / 2, kept, seed=stats.step)
        if not w.isfinite().all() or not w.any():
            w, self._fallbacks = min_norm_weights(G), 1.0
        weights[kept] = w
        return weights

    def report(self) -> dict[str, float]:
        """Return whether the last call had to fall back on min-norm weights."""
        return {"gradient/min_norm_fallback": self._fallbacks}

    @torch.no_grad()
    def _solve(self, G: Tensor, kept: Sequence[int], *, seed: int) -> Tensor:
        """Return the method's weights of the objectives ``kept``.

        The global generator is left as it was.
        """
        from torchjd.aggregation import GramianWeightedAggregator, WeightedAggregator

        method = self._build(kept)
        if len(kept) == 1:  # nothing to decide, and some methods cannot
            return torch.ones_like(G[0])
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # Nash-MTL solves a fresh problem each time, so cvxpy's cache would not help anyway.
            warnings.filterwarnings("ignore", "You are solving a parameterized problem that is not")
            torch.default_generator.manual_seed(seed)
            if isinstance(method, GramianWeightedAggregator):
                w = method.gramian_weighting(G)
            elif isinstance(method, WeightedAggregator):
                w = method.weighting(factor(G))
            else:  # the direction lies in the span of the rows
                J = factor(G)
                w = method(J) @ torch.linalg.pinv(J)
        return w.detach().double()

    def _build(self, kept: Sequence[int]) -> Aggregator:
        """Return a fresh solver for the objectives ``kept``.

        It holds nothing of an earlier call.
        """
        options = dict(self._options)
        if self._preference is not None:
            entries = [float(self._preference[k]) for k in kept]
            options["pref_vector"] = torch.tensor(entries, dtype=torch.float64)
        if self.name == "nashmtl":
            options["n_tasks"] = len(kept)
        return self._kind(**options)

    def _prefer(self, weights: Sequence[float]) -> None:
        """Take the importance of each objective for the preference vector, if there is one."""
        if len(weights) != len(self.objectives) or not all(0 < one < math.inf for one in weights):
            raise ValueError(
                "Parameter `weights` should have a positive finite entry per objective "
                f"{self.objectives}. Found {list(weights)}."
            )
        if self._preference is not None:
            raise ValueError(
                "Parameter `weights` should have equal entries where `options` has a "
                f"`pref_vector`, since both say what is preferred. Found {list(weights)}."
            )
        if "pref_vector" in inspect.signature(self._kind).parameters:
            self._preference = list(weights)
            return
        _log.warning(
            "The method %s of torchjd finds its own weights and knows no preference: the weights "
            "%s of %s are not used.",
            self._kind.__name__,
            list(weights),
            self.objectives,
        )

    def _try(self) -> None:
        """Solve once, so that what cannot work says so now and not after the first rollout."""
        K = len(self.objectives)
        try:
            self._solve(torch.eye(K, dtype=torch.float64), range(K), seed=0)
        except ImportError as error:
            raise ImportError(
                f"The method `{self.name}` of torchjd needs more packages: {error} Those of all "
                'methods but Nash-MTL come with: pip install "moa-diffusion[gradient]"'
            ) from error
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Parameter `options` should fit torchjd's {self._kind.__name__}"
                f"{inspect.signature(self._kind)} for {K} objectives. {error}"
            ) from error


def find_aggregator(name: str) -> type[Aggregator]:
    """Return TorchJD's aggregator of that name, case and separators aside.

    Raises:
        ImportError: If torchjd is not installed.
        ValueError: If there is none, or it needs more than one Gramian.
    """
    try:
        from torchjd import aggregation
    except ImportError as error:
        raise ImportError(
            'Weights from gradients need torchjd: pip install "moa-diffusion[gradient]"'
        ) from error
    public = {entry: getattr(aggregation, entry) for entry in aggregation.__all__}
    known = {
        _plain(entry): kind
        for entry, kind in public.items()
        if issubclass(kind, aggregation.Aggregator) and not entry.endswith("Aggregator")
    }
    by_gramian = aggregation.GramianWeightedAggregator
    usable = sorted(
        key
        for key, kind in known.items()
        if key not in REFUSED and (key in FROM_FACTOR or issubclass(kind, by_gramian))
    )
    plain = _plain(name)
    if plain in usable:
        return known[plain]
    if plain in known:
        reason = REFUSED.get(plain, "TorchJD offers it over Jacobians only")
        problem = f"cannot be used here: {reason}."
    else:
        problem = f"is unknown.{did_you_mean(plain, usable)}"
    raise ValueError(
        f"Parameter `aggregator` should be one of {', '.join(usable)}. Found {name!r}, which "
        + problem
    )


def factor(G: Tensor) -> Tensor:
    """Return a matrix ``J [K, K]`` with ``J J' = G``."""
    eigenvalues, V = torch.linalg.eigh(G)
    return V * eigenvalues.clamp(min=0).sqrt()


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
