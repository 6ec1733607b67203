"""Whether gradients of single objectives add up to those of an ordinary backward pass.

Which sample a row of a layer's input belongs to follows from how the model is written. Where that
differs from what ``gradients.py`` takes for granted, its rows are wrong and look right. So they are
compared once per run, on a few samples and with coefficients of which every sample has others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moa_diffusion.distributed import Comm
from moa_diffusion.policies.base import Policy
from moa_diffusion.training.gradients import ObjectiveGradients
from moa_diffusion.training.stepper import TrainingError
from moa_diffusion.types import Rollout

logger = logging.getLogger(__name__)

# Largest relative error of a tensor's gradient. Both ways share the passes through the network:
# between them lies the last product of each layer, rounded once or once for every row, and in some
# kernels in every sum on the way. In bfloat16 a rounding is up to 4e-3, and up to 6.4e-3 was seen.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
# Below this share of the whole gradient's length, a tensor's gradient may be nothing but rounding
# (that of a router whose only expert has the weight 1, say).
SMALL = 1e-2
SIZE = 0.01  # standard deviation of the noise that moves B away from 0, where A has no gradient

# Coefficients of two objectives. The largest and the sum are powers of two or 0, and scaling by
# them rounds nothing: so both backward passes round alike, whatever the depth of the network.
PAIRS = ((1.0, 0.0), (1.0, 1.0), (1.0, -0.5), (0.0, -1.0), (-1.0, -1.0), (0.5, -1.0), (1.0, -1.0))


class GradientCheck:
    """Checks once that the objectives' gradients add up to an ordinary one.

    Args:
        policy: The policy whose layers are checked.
        comm: The collectives over the processes.
        seed: Decides the disturbance and the coefficients.
    """

    def __init__(self, policy: Policy, comm: Comm, *, seed: int) -> None:
        self.policy, self.comm, self.seed = policy, comm, seed
        self._passed = False

    def __call__(self, rollout: Rollout, samples: int) -> None:
        """Check the first samples of a rollout, unless a check has passed before.

        Args:
            rollout: The n samples of this process.
            samples: How many of them are looked at.

        Raises:
            TrainingError: Naming the layers whose gradients are not those of a backward pass.
        """
        if self._passed:
            return
        part = rollout.select(torch.arange(samples))
        errors, separate = relative_errors(self.policy, part, seed=self.seed, comm=self.comm)
        tolerance = TOLERANCE[self.policy.dtype]
        wrong = {name: error for name, error in errors.items() if not error <= tolerance}
        if self.comm.any(bool(wrong)):
            worst = sorted(wrong, key=lambda name: -wrong[name])[:5]  # NaN in any place
            raise TrainingError(
                f"The gradients of single objectives are wrong in {len(wrong)} of {len(errors)} "
                "trained tensors on this process: they do not add up to an ordinary backward pass "
                f"(relative error above {tolerance:.0e}). Worst: "
                f"{', '.join(f'{name} ({wrong[name]:.1e})' for name in worst) or 'none'}. These "
                "layers take their samples in an order that is not known here. Leave them out of "
                "`policy.lora.target_modules`, or choose a method that weighs without gradients."
            )
        if separate:
            logger.warning(
                "The gradients of %d of %d trained tensors take a backward pass for each "
                "objective: their layers do not keep the samples apart.",
                separate,
                len(errors),
            )
        # Where no sample of theirs has a reward, nothing was looked at: the next rollout is.
        self._passed = self.comm.any(bool(part.mask.any()))


def relative_errors(
    policy: Policy, rollout: Rollout, *, seed: int, comm: Comm
) -> tuple[dict[str, float], int]:
    """Compare the sum of two objectives' rows with the gradient of their sum.

    The adapter is disturbed meanwhile, and is afterwards what it was.

    Args:
        policy: Whose ``tapped`` layers are tried.
        rollout: M samples that it drew.
        seed: Seed of the disturbance and of which sample gets which coefficients.
        comm: The collectives over the processes, which all try as many loss scales.

    Returns:
        By parameter the error relative to its own gradient or a small share of the whole one (NaN
        if a gradient is not finite), and how many parameters take a backward pass per objective.
    """
    source = torch.Generator().manual_seed(seed)
    steps = policy.step_chunks(rollout.log_probs.shape[1])[0]
    mask = rollout.mask[:, steps]
    parameters = policy.trainable()
    drawn = _coefficients(mask.shape, policy.row_per_sample, source).to(mask.device)
    coefficients = torch.where(mask, drawn, 0.0)  # [2, m, t]
    rows = ObjectiveGradients.of(policy, len(coefficients))
    with _disturbed(parameters, source):
        log_probs = policy.log_probs(rollout, steps).log_probs
        for scale in _scales(policy.dtype):
            rows.clear()
            rows.backward(
                log_probs,
                coefficients,
                tokens=policy.row_tokens(rollout),
                scale=scale,
                retain_graph=True,
            )
            gradients = torch.autograd.grad(
                log_probs,
                list(parameters.values()),
                grad_outputs=(coefficients.sum(0) * scale).to(log_probs.dtype),
                retain_graph=True,
                allow_unused=True,
            )
            expected = {
                name: torch.zeros_like(parameter) if gradient is None else gradient / scale
                for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
            }
            tensors = (*expected.values(), *rows.rows.values())
            if not comm.any(not all(tensor.isfinite().all() for tensor in tensors)):
                break
    sizes, errors = {}, {}
    for name, gradient in expected.items():
        each = rows.rows[name]  # [2, ...]
        # Sums may cancel: what is added up has the rounding errors.
        sizes[name] = torch.stack([gradient.norm(), each[0].norm(), each[1].norm()]).max()
        errors[name] = (each.sum(0) - gradient).norm()
    whole = torch.stack(list(sizes.values())).norm()
    if whole == 0:
        return dict.fromkeys(errors, 0.0), len(rows.separate)
    relative = {
        name: float(error / torch.maximum(sizes[name], SMALL * whole))
        for name, error in errors.items()
    }
    return relative, len(rows.separate)


def _coefficients(shape: torch.Size, whole: bool, source: torch.Generator) -> Tensor:
    """Return ``[2, m, t]``, others for every row as long as there are any."""
    samples, decisions = shape
    rows = samples if whole else samples * decisions
    order = torch.randperm(len(PAIRS), generator=source)
    pairs = torch.tensor(PAIRS)[order].T  # [2, pairs]
    values = pairs.repeat(1, -(-rows // len(PAIRS)))[:, :rows]  # [2, rows]
    return values[:, :, None].expand(-1, -1, decisions) if whole else values.view(2, *shape)


def _scales(dtype: torch.dtype) -> list[float]:
    """Return powers of two to try: in float16 small gradients vanish and large ones overflow."""
    return [2.0**power for power in range(24, -1, -4)] if dtype == torch.float16 else [1.0]


@contextmanager
def _disturbed(parameters: Mapping[str, nn.Parameter], source: torch.Generator) -> Iterator[None]:
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        with torch.no_grad():
            for parameter in parameters.values():
                noise = torch.randn(parameter.shape, generator=source)
                parameter.add_(SIZE * noise.to(parameter))
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
