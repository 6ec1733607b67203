"""Rollout after rollout: the loop, the trainers, and the update that an advantage becomes."""

from moa_diffusion.training.critic import Critic
from moa_diffusion.training.ema import EMA
from moa_diffusion.training.geometry import Geometry
from moa_diffusion.training.gradients import ObjectiveGradients
from moa_diffusion.training.loop import Run
from moa_diffusion.training.loss import clipped_surrogate
from moa_diffusion.training.offline import OfflineTrainer
from moa_diffusion.training.stepper import TrainingError
from moa_diffusion.training.trainer import Trainer

__all__ = [
    "EMA",
    "Critic",
    "Geometry",
    "ObjectiveGradients",
    "OfflineTrainer",
    "Run",
    "Trainer",
    "TrainingError",
    "clipped_surrogate",
]
