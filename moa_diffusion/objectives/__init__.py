"""From K rewards to one advantage per sample: normalizers and weightings.

Nothing here knows what a sample is, which model drew it, or how many processes there are.
"""

from moa_diffusion.objectives.apex import Apex
from moa_diffusion.objectives.base import (
    Normalizer,
    Weighting,
    combine,
    effective_weights,
    variance_share,
)
from moa_diffusion.objectives.chebyshev import Chebyshev
from moa_diffusion.objectives.gradient import Gradient
from moa_diffusion.objectives.metrics import cosine_metrics, reward_metrics
from moa_diffusion.objectives.mopo import Mopo
from moa_diffusion.objectives.mopo_offline import OfflineMopo, OfflineSettings
from moa_diffusion.objectives.noon import Noon
from moa_diffusion.objectives.normalize import GDPO, DualStage, PromptHistory, Raw
from moa_diffusion.objectives.pama import Pama, PamaVector
from moa_diffusion.objectives.static import Static
from moa_diffusion.objectives.win_rate import WinRate

__all__ = [
    "GDPO",
    "Apex",
    "Chebyshev",
    "DualStage",
    "Gradient",
    "Mopo",
    "Noon",
    "Normalizer",
    "OfflineMopo",
    "OfflineSettings",
    "Pama",
    "PamaVector",
    "PromptHistory",
    "Raw",
    "Static",
    "Weighting",
    "WinRate",
    "combine",
    "cosine_metrics",
    "effective_weights",
    "reward_metrics",
    "variance_share",
]
