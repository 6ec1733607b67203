"""Exact gradients of all K objectives from one backward pass, and their Gramian.

Objective k's surrogate gradient is ``g_k = sum_nt c_knt grad log pi_nt`` with a number ``c_knt``
per decision (advantage times ratio, 0 where it is clipped): the network is differentiated only
through ``sum_nt log pi_nt``. One backward pass of that sum brings to every linear layer its input
``x [R, L, in]`` and the gradient of its output ``dy [R, L, out]``, R rows of L tokens that each
belong to one decision, and there ``g_k = sum_R c_kR dy_R^T x_R``. For the two factors of a LoRA
layer the rows' own gradients are small, so that K objectives cost little more than one.

Per-example gradients from one backward pass: Goodfellow, arXiv 1510.01799. Contracting them with
K sets of coefficients is ours. The sum is exact for every k; what differs from K separate backward
passes is rounding.

Which row belongs to which decision is known from the policy and never guessed: a layer whose input
has another number of rows (experts of a mixture, which get some of the tokens), or that is not
called at all (a wrapper that uses the factors' product), is differentiated once per objective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from moa_diffusion.distributed import Comm
from moa_diffusion.policies.base import Policy
from moa_diffusion.processes.devices import float64_device, widest

# Below so many tokens a row, scaling the inputs K times is cheaper than a gradient for every row
# (one thread, rank 32, width 1024, K = 4: 0.3 to 0.6 of the time at 4 tokens, 1.2 to 1.7 at 8).
FEW_TOKENS = 8
ROUNDING = 1e-6  # between the proportions of decisions that are meant to have the same
CHUNK = 2**22  # numbers in a temporary: gradients of rows, columns of the Gramian


class Layer(Protocol):
    """A layer that hands over what the gradients of its weights are made of.

    Attributes:
        weights: Trained weights, each ``[p, q]``.
        leaves: Tensors that a backward pass must be asked for, in order to come by here.
        record: While it is set, called in the backward pass with a weight, ``left [R, ..., p]``
            and ``right [R, ..., q]``: the weight's gradient is the sum of ``left^T right`` over
            all axes but the last. The weights get no gradient from that pass.
    """

    weights: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    record: Callable[[Tensor, Tensor, Tensor], None] | None


class ObjectiveGradients:
    """The gradients of K objectives, summed over the micro-batches of an optimizer step.

    They may be measured under autocast and with gradient checkpointing (not the reentrant kind,
    which diffusers does not use). K times the trained parameters are kept in float64.

    A parameter that belongs to none of the ``layers``, or to one that a backward pass does not come
    by or finds with rows that cannot be told apart, gets its rows from K separate backward passes:
    exact, and slow.

    Args:
        parameters: What is trained, by name; all on one device.
        layers: That hand over, as ``Policy.tapped()`` gives them before the log-probabilities
            are computed.
        count: The number K of objectives.
        whole: Whether a row of a layer holds all t decisions of a sample (a text's tokens), instead
            of one. Then one backward pass serves the decisions of which the K coefficients have
            equal proportions within their sample: one pass while nothing is clipped, at most
            three on a clipped surrogate, and never more than K.
        copies: How often all rows stand in a layer's input, one set after the other: 2 with
            classifier-free guidance.

    Raises:
        ValueError: If ``count`` or ``copies`` is not positive, there is no parameter, or a layer's
            weight is not among them.

    Attributes:
        rows: By name, ``[K, *shape]``, of the type that sums are made in.
        separate: Names of the parameters that took K backward passes so far.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        layers: Sequence[Layer],
        count: int,
        *,
        whole: bool = False,
        copies: int = 1,
    ) -> None:
        if count < 1:
            raise ValueError(f"Parameter `count` should be at least 1. Found {count}.")
        if copies < 1:
            raise ValueError(f"Parameter `copies` should be at least 1. Found {copies}.")
        if not parameters:
            raise ValueError("Parameter `parameters` should not be empty.")
        self.count, self._whole, self._copies = count, whole, copies
        self._parameters, self._layers = dict(parameters), list(layers)
        sizes = [parameter.numel() for parameter in parameters.values()]
        device = next(iter(parameters.values())).device
        # [K, numbers]
        self._flat = torch.zeros(count, sum(sizes), dtype=widest(device), device=device)
        self._spans = dict(zip(parameters, pairwise(accumulate(sizes, initial=0)), strict=True))
        self.rows: dict[str, Tensor] = {
            name: self._flat[:, slice(*self._spans[name])].view(count, *parameter.shape)
            for name, parameter in parameters.items()
        }
        self._targets = {id(p): self.rows[name] for name, p in parameters.items()}
        weights = {id(weight) for layer in self._layers for weight in layer.weights}
        if not weights <= self._targets.keys():
            raise ValueError(
                "Parameter `layers` should have all their weights among the parameters. Found "
                f"{len(weights - self._targets.keys())} that are not."
            )
        self._outside = {name: p for name, p in parameters.items() if id(p) not in weights}
        self._names = {id(p): name for name, p in parameters.items()}
        self._foreign: set[int] = set()  # layers whose rows were once not those of the decisions
        self.separate: set[str] = set()
        self._summed = False  # over the processes

    @classmethod
    def of(cls, policy: Policy, count: int) -> ObjectiveGradients:
        """Return rows for ``count`` objectives, by what the policy says of its layers."""
        return cls(
            policy.trainable(),
            policy.tapped(),
            count,
            whole=policy.row_per_sample,
            copies=policy.row_copies,
        )

    def backward(
        self,
        log_probs: Tensor,
        coefficients: Tensor,
        *,
        tokens: int | None = None,
        scale: float = 1.0,
        retain_graph: bool = False,
    ) -> None:
        """Make one backward pass; add the gradients of ``sum_nt c_knt log_probs_nt`` to the rows.

        There are K of them, and the parameters' ``.grad`` stays as it is.

        A layer's first axis should hold the decisions sample by sample (``[m, t]`` flattened), or
        the m samples if they are ``whole``, ``copies`` times over; an axis of rows and tokens
        together is cut into rows of ``tokens``. Any other layer takes K backward passes. A
        log-probability must depend on its own rows alone. The graph may outlive the call; it goes
        with the caller's ``log_probs``.

        Args:
            log_probs: Log-probs ``[m, t]``, with gradient.
            coefficients: Derivatives ``[K, m, t]`` of the K losses by ``log_probs``.
            tokens: Number L of tokens of a row in this pass, if it is known.
            scale: For float16, where small gradients vanish. The backward pass starts from
                ``scale max_k |c_knt|``, so what suits the ordinary loss (``GradScaler``) suits
                here. The rows are divided by it again, in float32.
            retain_graph: As ``torch.autograd.backward`` has it, for a KL term that goes through
                the same graph afterwards.

        Raises:
            ValueError: If a shape does not fit, or ``scale`` is not positive.
            RuntimeError: If the rows have been summed over the processes since ``clear``, or the
                log-probabilities depend on no parameter.
        """
        self._check(log_probs, coefficients, scale)
        coefficients = coefficients.detach().to(log_probs.device, torch.float32)
        passes = self._by_sample(coefficients) if self._whole else [self._by_decision(coefficients)]
        alone: dict[str, Tensor] = dict(self._outside)  # what K passes are needed for
        chosen = [i for i in range(len(self._layers)) if i not in self._foreign]
        for seed, shares in passes if chosen else ():
            # The first pass shows all there is: the others go through the same graph.
            added = self._contract(log_probs, seed * scale, shares / scale, chosen, tokens)
            if mixed := added & self._foreign:  # a layer is called twice, one call does not fit
                self._contract(log_probs, seed * scale, -shares / scale, sorted(mixed), tokens)
            chosen = [i for i in chosen if i in added - self._foreign]
            if not chosen:
                break
        for i in set(range(len(self._layers))).difference(chosen):
            alone |= {self._names[id(w)]: w for w in self._layers[i].weights}
        separately = self._add_separately(alone, log_probs, coefficients, scale, retain_graph)
        if not chosen and not separately:
            raise RuntimeError(
                "The log-probabilities depend on none of the trained parameters: the backward pass "
                "came by none of the layers."
            )

    def _contract(
        self,
        log_probs: Tensor,
        seed: Tensor,
        shares: Tensor,
        chosen: Sequence[int],
        tokens: int | None,
    ) -> set[int]:
        """Return one backward pass from ``seed [m, t]``; objective k has ``shares_k`` of every row.

        Returns:
            Those of the chosen layers that added to the rows. Those that came by with rows of
            another number are ``_foreign`` from then on.
        """
        one = shares.shape[1] == 1  # whatever comes by belongs to it
        tiled = shares if one else shares.repeat(1, self._copies)  # [K, R]
        added: set[int] = set()

        def record(i: int, weight: Tensor, left: Tensor, right: Tensor) -> None:
            left_rows = arranged(left, tiled.shape[1], tokens, whole=self._whole)
            right_rows = arranged(right, tiled.shape[1], tokens, whole=self._whole)
            if left_rows is None or right_rows is None:
                self._foreign.add(i)
                return
            added.add(i)
            add_rows(self._targets[id(weight)], tiled, left_rows, right_rows)

        for i in chosen:
            self._layers[i].record = partial(record, i)
        try:
            torch.autograd.grad(  # whose results, if any, are not wanted
                log_probs,
                [leaf for i in chosen for leaf in self._layers[i].leaves],
                grad_outputs=seed.to(log_probs.dtype),
                retain_graph=True,  # some layers may turn out to need passes of their own
                allow_unused=True,
            )
        finally:
            for i in chosen:
                self._layers[i].record = None
        return added

    @staticmethod
    def _by_decision(coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Return seed ``[m, t]`` and shares ``[K, m t]`` of one pass, where a row is a decision."""
        seed = coefficients.abs().amax(0)
        return seed, torch.where(seed == 0, 0, coefficients / seed).flatten(1)

    def _by_sample(self, coefficients: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return seeds ``[m, t]`` and shares ``[K, m]`` whose products sum to the coefficients."""
        seed, flat = self._by_decision(coefficients)
        shares, left = flat.view_as(coefficients), seed != 0
        passes: list[tuple[Tensor, Tensor]] = []
        while left.any():
            if len(passes) == self.count:  # each objective by itself is as good
                unit = torch.eye(self.count, device=seed.device)
                return [
                    (row, share[:, None].expand(-1, len(seed)))
                    for row, share in zip(coefficients, unit, strict=True)
                ]
            first = left.float().argmax(1)[None, :, None].expand(self.count, -1, 1)
            share = shares.gather(2, first)  # [K, m, 1]
            chosen = left & ((shares - share).abs() <= ROUNDING).all(0)
            passes.append((torch.where(chosen, seed, 0), share[:, :, 0]))
            left = left & ~chosen
        return passes or [(seed, shares[:, :, 0])]

    @torch.no_grad()
    def gramian(self, comm: Comm) -> Tensor:
        """Return the inner products of the K gradients of all processes together.

        The first call since ``clear`` sums the rows over the processes, in place and in one
        message: the Gramian is quadratic, so the sum has to come first.

        Returns:
            ``[K, K]`` float64 on the CPU; not finite where a gradient is not.
        """
        if not self._summed:
            comm.sum_([self._flat])
            self._summed = True
        device = float64_device(self._flat.device)
        total = torch.zeros(self.count, self.count, dtype=torch.float64, device=device)
        for part in self._flat.split(max(1, CHUNK // self.count), dim=1):
            wide = part.to(device).double()
            total += wide @ wide.T
        return ((total + total.T) / 2).cpu()

    @torch.no_grad()
    def write(self, weights: Tensor) -> None:
        """Add ``sum_k weights_k rows_k`` to every parameter's ``.grad``, or make it that.

        After ``gramian`` the rows are those of all processes: what ``.grad`` holds before (the
        gradient of a KL term) should be summed over them as well, and the result not again. Where
        a ``GradScaler`` will divide ``.grad``, multiply the weights by its scale.

        Args:
            weights: The objectives' weights, ``[K]``.

        Raises:
            ValueError: If the shape is another.
        """
        if weights.shape != (self.count,):
            raise ValueError(
                f"Parameter `weights` should have the shape ({self.count},). "
                f"Found {tuple(weights.shape)}."
            )
        mixed = weights.to(self._flat) @ self._flat  # [numbers]
        for name, parameter in self._parameters.items():
            part = mixed[slice(*self._spans[name])].view_as(parameter)
            if parameter.grad is None:
                parameter.grad = part.to(parameter.dtype)
            else:
                parameter.grad += part

    def clear(self) -> None:
        """Start anew, for the next optimizer step."""
        self._flat.zero_()
        self._summed = False

    def _check(self, log_probs: Tensor, coefficients: Tensor, scale: float) -> None:
        if log_probs.ndim != 2:
            raise ValueError(
                "Parameter `log_probs` should have the shape [m, t]. "
                f"Found {tuple(log_probs.shape)}."
            )
        expected = (self.count, *log_probs.shape)
        if coefficients.shape != expected:
            raise ValueError(
                f"Parameter `coefficients` should have the shape {expected}. "
                f"Found {tuple(coefficients.shape)}."
            )
        if not scale > 0:
            raise ValueError(f"Parameter `scale` should be positive. Found {scale}.")
        if self._summed:
            raise RuntimeError(
                "The rows hold the sum over the processes: call `clear` before adding to them."
            )

    def _add_separately(
        self,
        parameters: Mapping[str, Tensor],
        log_probs: Tensor,
        coefficients: Tensor,
        scale: float,
        retain_graph: bool,
    ) -> bool:
        """Compute these parameters' rows, one backward pass each; return whether there are any."""
        used = dict(parameters)
        for k, row in enumerate(coefficients):
            if not used:
                return False
            gradients = torch.autograd.grad(
                log_probs,
                list(used.values()),
                grad_outputs=(row * scale).to(log_probs.dtype),
                retain_graph=retain_graph or k < self.count - 1,
                allow_unused=True,
            )
            by_name = dict(zip(used, gradients, strict=True))
            # A layer that nothing depends on costs no further pass.
            used = {name: p for name, p in used.items() if by_name[name] is not None}
            for name in used:
                self.rows[name][k] += by_name[name] / scale
        self.separate |= used.keys()
        return True


def arranged(values: Tensor, rows: int, tokens: int | None, *, whole: bool) -> Tensor | None:
    """Return a layer's input with R rows as its first axis, or None if they cannot be told apart.

    Args:
        values: The layer's input, ``[R, ..., q]`` or ``[R L, q]``; of any shape if there is one
            row.
        rows: Number R of rows.
        tokens: Number L of tokens of a row, if it is known.
        whole: Whether a row holds all decisions of a sample, and so has an axis of tokens.
    """
    if rows == 1:
        return values.reshape(1, -1, values.shape[-1])
    if len(values) == rows and (values.ndim > 2 or not whole):
        return values
    if values.ndim == 2 and tokens is not None and len(values) == rows * tokens:
        return values.unflatten(0, (rows, tokens))
    return None


def add_rows(rows: Tensor, shares: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``sum_R shares_kR left_R^T right_R`` to ``rows_k``, for every k.

    Args:
        rows: Sums ``[K, p, q]``, which are added to in place.
        shares: Factors ``[K, R]`` of each row for each objective, float32.
        left: Left factors ``[R, ..., p]`` of the rows' gradients.
        right: Right factors ``[R, ..., q]``, of the same dtype.
    """
    count = len(left)
    left, right = (t.reshape(count, -1, t.shape[-1]) for t in (left, right))  # [R, L, p or q]
    if left.shape[1] < FEW_TOKENS:
        add, each = _add_by_scaling, left.shape[1] * len(rows) * sum(rows.shape[1:])
    else:
        add, each = _add_by_row, rows[0].numel()
    if count * each <= CHUNK:
        add(rows, shares, left, right)
        return
    step = max(1, CHUNK // each)
    for part in zip(shares.split(step, dim=1), left.split(step), right.split(step), strict=True):
        add(rows, *part)


def _add_by_row(rows: Tensor, shares: Tensor, left: Tensor, right: Tensor) -> None:
    """Add K sums of the gradients of every row: costs L + K products per number."""
    gradients = torch.bmm(left.transpose(1, 2), right).float()  # [R, p, q]
    rows += (shares @ gradients.flatten(1)).view_as(rows)


def _add_by_scaling(rows: Tensor, shares: Tensor, left: Tensor, right: Tensor) -> None:
    """Add products whose narrower side is scaled by each share: K L products per number."""
    left, right, by = left.float(), right.float(), shares.T[:, None, :, None]  # [R, 1, K, 1]
    if left.shape[2] <= right.shape[2]:
        scaled = (by * left[:, :, None]).flatten(2).flatten(0, 1)  # [R L, K p]
        rows += (scaled.T @ right.flatten(0, 1)).unflatten(0, (len(rows), -1))
    else:
        scaled = (by * right[:, :, None]).flatten(2).flatten(0, 1)  # [R L, K q]
        products = left.flatten(0, 1).T @ scaled  # [p, K q]
        rows += products.unflatten(1, (len(rows), -1)).transpose(0, 1)
