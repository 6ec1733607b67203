"""Cards that a plan is made for, with the numbers of their data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from moa_diffusion.types import ConfigError
from rewards.suggestions import did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A card, in the units of its data sheet: 10^9 bytes, 10^12 operations per second."""

    name: str
    memory: float  # GB
    half: float  # TFLOP/s in float16 and bfloat16: dense, sums in float32
    single: float  # TFLOP/s in float32, without tensor cores
    bandwidth: float  # GB/s

    def rate(self, dtype: str, *, convolutions: bool = False) -> float:
        """Return the largest rate in operations per second.

        Args:
            dtype: Data type of the products.
            convolutions: Whether they are those of convolutions, which PyTorch runs in TF32 where
                they are float32; on all of these cards that is half the rate of float16.
        """
        if dtype == "float32":
            return (self.half / 2 if convolutions else self.single) * 1e12
        return self.half * 1e12


GPUS = {
    card.name: card
    for card in (
        # NVIDIA Ampere GA102 whitepaper, appendix: GeForce RTX 3090.
        Gpu(name="3090", memory=24, half=71, single=35.6, bandwidth=936),
        # NVIDIA Ada GPU architecture whitepaper, appendix: GeForce RTX 4090.
        Gpu(name="4090", memory=24, half=165.2, single=82.6, bandwidth=1008),
        # NVIDIA RTX Blackwell GPU architecture whitepaper, appendix: GeForce RTX 5090.
        Gpu(name="5090", memory=32, half=209.5, single=104.8, bandwidth=1792),
        # NVIDIA A100 data sheet: 40 GB PCIe and SXM, 80 GB SXM.
        Gpu(name="a100-40", memory=40, half=312, single=19.5, bandwidth=1555),
        Gpu(name="a100-80", memory=80, half=312, single=19.5, bandwidth=2039),
        # NVIDIA L40S data sheet.
        Gpu(name="l40s", memory=48, half=362, single=91.6, bandwidth=864),
        # NVIDIA H100 data sheet: SXM; half of the rate that it states with sparsity.
        Gpu(name="h100", memory=80, half=989, single=67, bandwidth=3350),
        # NVIDIA H200 data sheet: SXM; likewise.
        Gpu(name="h200", memory=141, half=989, single=67, bandwidth=4800),
        # NVIDIA HGX B200 data sheet: an eighth of the eight cards'; likewise.
        Gpu(name="b200", memory=180, half=2250, single=75, bandwidth=7700),
    )
}


def gpu(name: str) -> Gpu:
    """Return a card by its name.

    Raises:
        ConfigError: For a name that is not known.
    """
    if name not in GPUS:
        raise ConfigError(
            f"--card: should be one of {', '.join(GPUS)}. Found {name!r}.{did_you_mean(name, GPUS)}"
        )
    return GPUS[name]
