"""MOPO's closed form and its dual (arXiv 2505.10892), for responses that are already there.

Win rates ``pbar`` (primary) and ``qbar_k`` (secondary) of each response against a fixed opponent::

    max_pi  E_pi pbar - tau KL(pi || ref)   subject to   E_pi qbar_k >= b_k

For fixed multipliers the optimum tilts the reference, ``pi = rho ref``, and the multipliers follow
the violation::

    rho(x, y) = exp((pbar + lambda . qbar) / tau - log Z(x)),   Z(x) = E_{y ~ ref} exp(...)
    G_k       = E_{x, y ~ ref} rho qbar_k
    lambda_k <- [lambda_k + eta (b_k - G_k)]_+

``OfflineMopo`` runs them over a set of responses. The reference follows the policy, and the bounds
follow the reference::

    every ``lag`` steps:   log ref(y|x) <- log pi_{t - lag}(y|x) - log mu(y|x), normalised per
    prompt
                         b_k <- max(b_user, beta G_k)         "ratchet"
                         b_k <- beta G_k                      "beta_lag", as published

with ``mu`` the policy that wrote the responses: each is one draw from it.

Axes: ``[K, P, Y]`` is secondary objectives, prompts, responses of a prompt.

Deviations: reconstructed from descriptions of the paper, without its code. ``rho`` is normalised
per prompt; the published form has a constant -1 in place of ``log Z(x)``, with which a bound on
``G`` need not bind. A cap on ``lambda`` and on ``log rho`` is ours, as are the ratchet (``beta G``
alone lets a secondary objective sink by a factor ``beta`` at a time), the weights ``ref / mu`` of a
lagged reference, levels over many responses in place of a minibatch, and the damped barrier.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Variant = Literal["lagrangian", "barrier"]
Follow = Literal["ratchet", "beta_lag"]


def tilt(
    pbar: Tensor,
    qbar: Tensor,
    lambdas: Tensor,
    tau: float,
    log_ref: Tensor,
    *,
    log_cap: float = math.inf,
) -> Tensor:
    """Return the density of the optimal policy over the reference: ``rho [P, Y]``.

    Args:
        pbar: Win rates ``[P, Y]`` of the primary objective.
        qbar: Win rates ``[K, P, Y]`` of the secondary objectives.
        lambdas: Multipliers ``[K]``, at least 0.
        tau: Weight of the KL, positive.
        log_ref: Logarithm of the reference, ``[P, Y]``, each row the logarithm of a distribution:
            ``-log Y`` for responses that were sampled from the reference, ``-inf`` for padding.
        log_cap: Largest ``log rho``; positive. Below infinity the rows need not average 1.
    """
    if not tau > 0:
        raise ValueError(f"Parameter `tau` should be positive. Found {tau}.")
    score = (pbar + torch.einsum("k,kpy->py", lambdas, qbar)) / tau  # [P, Y]
    log_z = (score + log_ref).logsumexp(1, keepdim=True)  # [P, 1]
    return (score - log_z).clamp(max=log_cap).exp()


def constraint_levels(rho: Tensor, qbar: Tensor, log_ref: Tensor) -> Tensor:
    """Return ``G_k``, the mean win rate of the tilted policy: ``[K]``.

    Args:
        rho: Density ``[P, Y]`` of the policy over the reference.
        qbar: Win rates ``[K, P, Y]`` of the secondary objectives.
        log_ref: Logarithm of the reference, ``[P, Y]``.
    """
    return (log_ref.exp() * rho * qbar).sum(2).mean(1)


def pessimistic(rho: Tensor, qbar: Tensor, log_ref: Tensor, eps: float) -> Tensor:
    """Return the smallest ``G_k`` over all data distributions within KL ``eps`` of this: ``[K]``.

    That is ``max_chi -chi log E_ref exp(-rho qbar_k / chi) - chi eps`` over ``chi > 0``. With
    ``f = rho qbar`` the worst distribution is ``q ~ ref exp(-f / chi)``, and the value of the dual
    ``E_q f + chi (KL(q) - eps)``. ``KL`` falls with ``chi``, which is found by bisection and a step
    of Newton's; at the maximum the value is flat, so that an error of 1e-6 in ``chi`` is one of
    1e-12 in it.

    Args:
        rho: Density ``[P, Y]`` of the policy over the reference.
        qbar: Win rates ``[K, P, Y]`` of the secondary objectives.
        log_ref: Logarithm of the reference, ``[P, Y]``.
        eps: Radius of the ball in nats; 0 gives ``constraint_levels``.
    """
    if not 0 <= eps < math.inf:
        raise ValueError(f"Parameter `eps` should be finite and not negative. Found {eps}.")
    if eps == 0:
        return constraint_levels(rho, qbar, log_ref)
    log_p = (log_ref - math.log(len(log_ref))).flatten()  # [P Y], over prompts and responses
    possible = log_p > -math.inf
    log_p, f = log_p[possible], (rho * qbar).flatten(1)[:, possible]  # [J], [K, J]
    extent = f.amax(1) - f.amin(1)  # [K]
    extent = torch.where(extent > 0, extent, 1.0)

    def worst(log_chi: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # chi, KL(q), q: [K], [K], [K, J]
        chi = extent * log_chi.exp()
        log_q = (log_p - f / chi[:, None]).log_softmax(1)
        q = log_q.exp()
        return chi, (q * (log_q - log_p)).sum(1), q

    low, high = torch.full_like(extent, -12.0), torch.full_like(extent, 12.0)  # log(chi / extent)
    for _ in range(14):
        middle = (low + high) / 2
        outside = worst(middle)[1] > eps
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    chi, kl, q = worst(high)
    variance = (q * f.square()).sum(1) - (q * f).sum(1).square()
    step = (kl - eps) * chi.square() / torch.where(variance > 0, variance, math.inf)
    chi, kl, q = worst((high + step).clamp(low, high))
    # Where the ball holds even the distribution on the smallest value, chi goes to 0.
    return (q * f).sum(1) + torch.where(low > -12, chi * (kl - eps), 0.0)


def dual_step(
    lambdas: Tensor, levels: Tensor, bounds: Tensor, eta: float, maximum: float = math.inf
) -> Tensor:
    """Return ``[lambda + eta (b - G)]_+``, at most ``maximum``: ``[K]`` from three ``[K]``.

    Args:
        lambdas: Multipliers ``[K]``, at least 0.
        levels: Levels ``[K]`` that were reached.
        bounds: Bounds ``[K]``, in the levels' unit.
        eta: Step size.
        maximum: The largest multiplier.
    """
    return (lambdas + eta * (bounds - levels)).clamp(0.0, maximum)


def barrier(levels: Tensor, bounds: Tensor, sigma: float, maximum: float) -> Tensor:
    """Return the multipliers of MOPO-LB, the logarithmic barrier ``sigma log(G - b)``: ``[K]``.

    ``sigma / (G - b)``, at most ``maximum``, which is also the answer at the bound and below it.

    Args:
        levels: Levels ``[K]`` that were reached.
        bounds: Bounds ``[K]``, in the levels' unit.
        sigma: Strength of the barrier.
        maximum: The largest multiplier.
    """
    slack = levels - bounds
    inside = sigma / torch.where(slack > 0, slack, 1.0)
    return torch.where(slack > 0, inside, maximum).clamp(max=maximum)


def barrier_step(
    lambdas: Tensor, levels: Tensor, bounds: Tensor, eta: float, sigma: float, maximum: float
) -> Tensor:
    """Return a dual step for the barrier, whose fixed point is ``sigma / (G - b)``: ``[K]``.

    ``lambda`` minimises ``lambda (G - b) - sigma log lambda + (lambda - before)^2 / (2 eta)``.
    Where ``G`` answers at once, ``barrier`` swings between nothing and the maximum; this step is
    as stable as ``dual_step``, which it is for ``sigma`` = 0.

    Args:
        lambdas: Multipliers ``[K]``, at least 0.
        levels: Levels ``[K]`` that were reached.
        bounds: Bounds ``[K]``, in the levels' unit.
        eta: Step size.
        sigma: Strength of the barrier.
        maximum: The largest multiplier.
    """
    a = lambdas + eta * (bounds - levels)
    return ((a + (a.square() + 4 * eta * sigma).sqrt()) / 2).clamp(max=maximum)


def effective_samples(weights: Tensor) -> float:
    """Return how many responses carry a prompt's weight, 1 to Y: mean ``(sum w)^2 / sum w^2``.

    Args:
        weights: Weights of the responses, ``[P, Y]``, not negative, 0 for padding.
    """
    return float((weights.sum(1).square() / weights.square().sum(1)).mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineSettings:
    """Settings of ``OfflineMopo``.

    Args:
        tau: Weight of the KL to the reference; positive.
        eta: Length of a dual step; positive.
        maximum: Largest multiplier; positive.
        log_cap: Largest ``log rho``; positive.
        eps: Radius of the pessimistic ball in nats, at least 0, 0.15 in the paper; 0 takes the
            mean.
        variant: How multipliers follow the levels: ``lagrangian``, or ``barrier`` (MOPO-LB).
        sigma: Strength of the barrier, positive; the primary objective may lose about this much per
            bound.
        lag: Number of steps between two references, at least 0; with 0 it stays the data's.
        follow: How bounds follow the level at a new reference: ``ratchet`` or ``beta_lag``.
        beta: Share of the level that becomes a bound, in [0, 1]; 0 with ``ratchet`` keeps the
            bounds as they are.
    """

    tau: float = 0.08
    eta: float = 0.05
    maximum: float = 10.0
    log_cap: float = 10.0
    eps: float = 0.0
    variant: Variant = "lagrangian"
    sigma: float = 0.01
    lag: int = 500
    follow: Follow = "ratchet"
    beta: float = 0.9995

    def __post_init__(self) -> None:
        for name, choice, known in (
            ("variant", self.variant, get_args(Variant)),
            ("follow", self.follow, get_args(Follow)),
        ):
            if choice not in known:
                raise ValueError(f"Parameter `{name}` should be one of {known}. Found {choice!r}.")
        for name, value, good, wanted in (
            ("tau", self.tau, 0 < self.tau < math.inf, "finite and positive"),
            ("eta", self.eta, 0 < self.eta < math.inf, "finite and positive"),
            ("maximum", self.maximum, 0 < self.maximum < math.inf, "finite and positive"),
            ("log_cap", self.log_cap, self.log_cap > 0, "positive"),
            ("eps", self.eps, 0 <= self.eps < math.inf, "finite and not negative"),
            ("sigma", self.sigma, 0 < self.sigma < math.inf, "finite and positive"),
            ("lag", self.lag, self.lag >= 0, "at least 0"),
            ("beta", self.beta, 0 <= self.beta <= 1, "in [0, 1]"),
        ):
            if not good:
                raise ValueError(f"Parameter `{name}` should be {wanted}. Found {value}.")


class OfflineMopo(nn.Module):
    """Target distribution over the responses that are there, and its multipliers.

    A response that an objective was not compared on says nothing of it: in tilt and level it counts
    as the mean of the prompt's other responses. A prompt without any comparison of an objective is
    left out of the objective's level, and tilted by the others alone. A prompt whose reference is
    not known (NaN) is left out of everything.

    Args:
        primary: Name of the objective that is improved.
        secondary: Names of the K others.
        pbar: Win rates ``[P, Y]`` of the primary objective; NaN: not compared, or padding.
        qbar: Win rates ``[K, P, Y]`` of the secondary objectives.
        log_data: Logarithm of the data's distribution, ``[P, Y]``, ``-log Y`` of the prompt's
            responses and ``-inf`` for padding.
        bounds: Least levels of the K secondary objectives.
        settings: The settings of the algorithm.
    """

    lambdas: Tensor  # [K]
    level: Tensor  # [K] G of the target; NaN: not known at the present reference
    followed: Tensor  # [K] beta G at the last new reference; -inf: none so far
    warned: Tensor  # [K] bool
    log_ref: Tensor  # [P, Y] of the reference, over the responses; NaN: not known
    lagged: Tensor  # [P, Y] log pi - log mu of what will be the next reference; likewise

    def __init__(
        self,
        *,
        primary: str,
        secondary: Sequence[str],
        pbar: Tensor,
        qbar: Tensor,
        log_data: Tensor,
        bounds: Sequence[float],
        settings: OfflineSettings,
    ) -> None:
        super().__init__()
        self.primary, self.secondary, self.settings = primary, tuple(secondary), settings
        for name, shape, wanted in (
            ("pbar", tuple(pbar.shape), tuple(log_data.shape)),
            ("qbar", tuple(qbar.shape), (len(self.secondary), *log_data.shape)),
            ("bounds", (len(bounds),), (len(self.secondary),)),
        ):
            if shape != wanted:
                raise ValueError(f"Parameter `{name}` should have shape {wanted}. Found {shape}.")
        rates = torch.cat([pbar[None], qbar]).double()  # [1 + K, P, Y], the primary first
        self.log_data = log_data.double()
        rates = torch.where(self.log_data > -math.inf, rates, math.nan)
        mean = rates.nanmean(2, keepdim=True).nan_to_num(nan=0.0)  # [1 + K, P, 1]
        self.applies = ~rates.isnan().all(2)  # [1 + K, P]
        self.rates = torch.where(rates.isnan(), mean, rates)
        self.floor = torch.tensor(list(bounds), dtype=torch.float64)  # [K] the user's bounds
        self.reached = math.nan  # the target's win rate in the primary objective

        zeros = torch.zeros(len(self.secondary), dtype=torch.float64)
        self.register_buffer("lambdas", zeros.clone())
        self.register_buffer("level", torch.full_like(zeros, math.nan))
        self.register_buffer("followed", torch.full_like(zeros, -math.inf))
        self.register_buffer("warned", zeros.bool())
        self.register_buffer("log_ref", self.log_data.clone())
        self.register_buffer("lagged", torch.zeros_like(self.log_data))

    def forward(self, kl_scale: float = 1.0) -> Tensor:
        """Return one dual step; then the target ``[P, Y]`` at these multipliers.

        Each row is a distribution, or sums to less than 1 where ``log_cap`` binds; NaN where the
        reference is not known. ``kl_scale`` is a factor of ``tau``.
        """
        options, b = self.settings, self.bounds()
        if options.variant == "lagrangian":
            stepped = dual_step(self.lambdas, self.level, b, options.eta, options.maximum)
        else:
            stepped = barrier_step(
                self.lambdas, self.level, b, options.eta, options.sigma, options.maximum
            )
        self.lambdas = torch.where(self.level.isnan(), self.lambdas, stepped)
        rho = self.tilted(self.lambdas, kl_scale)
        self.reached = self.level_at(rho, 0, eps=0.0)
        levels = [self.level_at(rho, k, eps=options.eps) for k in range(1, len(self.rates))]
        self.level = torch.tensor(levels, dtype=torch.float64)
        self._watch()
        return rho * self.log_ref.exp()

    def tilted(self, lambdas: Tensor, kl_scale: float = 1.0) -> Tensor:
        """Return ``rho [P, Y]`` at these multipliers ``[K]``."""
        tau, cap = self.settings.tau * kl_scale, self.settings.log_cap
        return tilt(self.rates[0], self.rates[1:], lambdas, tau, self.log_ref, log_cap=cap)

    def level_at(self, rho: Tensor, k: int, *, eps: float) -> float:
        """Return the level of objective k (0: the primary) under ``rho``; NaN if not known.

        Args:
            rho: Density ``[P, Y]`` of the policy over the reference.
            k: Index of the objective among the primary and the K secondary ones.
            eps: Radius of the KL ball in nats, as in ``pessimistic``.
        """
        a = self.applies[k] & ~self.log_ref.isnan().any(1)  # [P]
        if not a.any():
            return math.nan
        return float(pessimistic(rho[a], self.rates[k : k + 1, a], self.log_ref[a], eps))

    def bounds(self) -> Tensor:
        """Return the bounds that hold at present: ``[K]``."""
        if self.settings.follow == "ratchet":
            return torch.maximum(self.floor, self.followed)
        return torch.where(self.followed.isinf(), self.floor, self.followed)

    def begin(self, log_ratio: Tensor) -> None:
        """Start from a reference other than the policy that wrote the responses.

        Args:
            log_ratio: Log ratios ``[P, Y]``, log ref - log mu of each response; NaN: not known.
        """
        self.log_ref = (self.log_data + log_ratio).log_softmax(1)
        self.lagged = log_ratio

    def refer(self, log_ratio: Tensor) -> None:
        """Take the policy of the last call (at first: the start) as the reference.

        Args:
            log_ratio: Log ratios ``[P, Y]``, log pi - log mu of each response under the policy as
                it is; NaN for prompts that will not be asked about while it is the reference.
        """
        self.log_ref = (self.log_data + self.lagged).log_softmax(1)
        self.lagged = log_ratio
        self.followed = self.settings.beta * self.level
        self.level = torch.full_like(self.level, math.nan)

    def levels_of(self, log_ratio: Tensor) -> dict[str, float]:
        """Return the win rates of a policy over the responses, by objective.

        Args:
            log_ratio: Log ratios ``[P, Y]``, log pi - log mu of each response; NaN for prompts to
                leave out.
        """
        pi = (self.log_data + log_ratio).softmax(1)
        known = ~log_ratio.isnan().any(1)  # [P]
        means = [
            (pi * rate).sum(1)[a & known].mean()
            for rate, a in zip(self.rates, self.applies, strict=True)
        ]
        return dict(zip((self.primary, *self.secondary), map(float, means), strict=True))

    def report(self) -> dict[str, float]:
        """Return the primary level, and level, bound, violation and multiplier of the others."""
        metrics = {f"mopo_level/{self.primary}": self.reached}
        for k, (name, bound) in enumerate(zip(self.secondary, self.bounds(), strict=True)):
            metrics[f"mopo_level/{name}"] = float(self.level[k])
            metrics[f"mopo_bound/{name}"] = float(bound)
            metrics[f"mopo_violation/{name}"] = float(bound - self.level[k])
            metrics[f"mopo_lambda/{name}"] = float(self.lambdas[k])
        return metrics

    def headline(self) -> str:
        """Return level and multiplier of every bound, for the progress bar."""
        pairs = zip(self.secondary, self.level, self.lambdas, strict=True)
        return ", ".join(f"{name} G {g:.3f} lambda {value:.3g}" for name, g, value in pairs)

    def _watch(self) -> None:
        """Warn once of a bound that the largest multiplier does not reach."""
        stuck = (self.lambdas >= self.settings.maximum) & (self.level < self.bounds())
        for k in (stuck & ~self.warned).nonzero().flatten().tolist():
            logger.warning(
                "Bound %.4g on `%s` may be out of reach: its multiplier sits at the largest, %g, "
                "and the level is %.4g.",
                float(self.bounds()[k]),
                self.secondary[k],
                self.settings.maximum,
                float(self.level[k]),
            )
        self.warned = self.warned | stuck
