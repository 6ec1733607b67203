"""Statistics of outputs: by hand, and in the direction that they are named after."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moa_diffusion.monitoring import drift


def plain(red: float, green: float, blue: float, side: int = 8) -> torch.Tensor:
    return torch.tensor([red, green, blue]).float()[None, :, None, None].expand(1, 3, side, side)


def checks(period: int, side: int = 16) -> torch.Tensor:
    """Black and white columns of ``period`` pixels."""
    column = (torch.arange(side) // period % 2).float()
    return column.expand(1, 3, side, side)


def test_images_by_hand():
    """Pixels are float32, rounded by 6e-8; pytest's default is 1e-6, relative."""
    images = torch.cat([plain(1, 0, 0), plain(0.5, 0.5, 0.5), plain(0, 0, 0), plain(1, 0.5, 0.5)])
    found = drift.of_images(images)
    assert found["brightness"].tolist() == pytest.approx([0.299, 0.5, 0, 0.299 + 0.701 / 2])
    assert found["saturation"].tolist() == pytest.approx([1, 0, 0, 0.5])
    assert found["contrast"].tolist() == pytest.approx([0] * 4, abs=1e-6)
    assert found["high_frequency"].tolist() == [0] * 4
    fine, coarse = drift.of_images(checks(1)), drift.of_images(checks(8))
    assert float(fine["contrast"]) == float(coarse["contrast"]) == pytest.approx(0.5)
    assert float(fine["high_frequency"]) == pytest.approx(1)
    assert float(coarse["high_frequency"]) < 0.1  # an edge has 0.078


def test_a_pixel_is_an_image():
    found = drift.of_images(torch.rand(3, 3, 1, 1))
    assert found["high_frequency"].tolist() == [0, 0, 0]
    assert found["contrast"].tolist() == [0, 0, 0]


def in_float64(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The definitions, written down in the plainest way."""
    images = images.double()
    luma = torch.einsum("c,nchw->nhw", torch.tensor(drift.LUMA).double(), images)
    high, low = images.amax(1), images.amin(1)
    power = torch.fft.fft2(luma - luma.mean((1, 2), keepdim=True)).abs().square()
    rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64) for side in luma.shape[1:])
    fine = (rows[:, None].square() + columns.square()).sqrt() > drift.CUTOFF
    return {
        "brightness": luma.mean((1, 2)),
        "saturation": ((high - low) / high.clamp(min=1e-300)).mean((1, 2)),
        "contrast": luma.flatten(1).std(1, correction=0),
        "high_frequency": (power * fine).sum((1, 2)) / power.sum((1, 2)),
    }


@pytest.mark.parametrize("shape", [(64, 64), (40, 60), (33, 64), (64, 33), (5, 3), (4, 4)])
def test_float32_is_enough(shape: tuple[int, int]):
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(5, 3, *shape, generator=generator)
    dim = 0.999 + 1e-3 * noise[:2]  # almost white: all that differs is small
    for images in (noise, torch.nn.functional.avg_pool2d(noise, 3, 1, 1), dim):
        found, expected = drift.statistics(images, batch=2), in_float64(images)
        assert found.keys() == expected.keys()
        for name, values in found.items():
            assert values.dtype == torch.float64
            # Pixels are rounded at 6e-8 of 1; the spread of the dim ones, 1e-4, is 1,600 times
            # that: 6e-4, less in a mean. What is summed of the others stays within 100 roundings.
            close = {"rtol": 2e-3, "atol": 1e-6} if images is dim else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(values, expected[name], **close)


class Largest(TorchDispatchMode):
    """The largest result by type, in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            most = max(self.numbers.get(result.dtype, 0), result.numel())
            self.numbers[result.dtype] = most
        return result


def test_memory_is_that_of_a_batch_in_float32():
    images = torch.rand(12, 3, 32, 32)
    with Largest() as largest:
        drift.statistics(images, device=torch.device("cpu"), batch=3)
    assert largest.numbers[torch.float32] <= 3 * images[0].numel()
    assert torch.complex128 not in largest.numbers
    assert largest.numbers[torch.float64] < images[0].numel()  # which frequencies are high


def test_blur_takes_high_frequencies_away_and_noise_brings_them():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 32, 32, generator=generator)
    soft = torch.nn.functional.avg_pool2d(image, 5, 1, 2)
    noisy = (soft + 0.1 * torch.randn(soft.shape, generator=generator)).clamp(0, 1)
    high = [float(drift.of_images(p)["high_frequency"]) for p in (soft, noisy, image)]
    assert high == sorted(high)
    assert high[0] < 0.2 < 0.5 < high[2]


def test_diversity_of_images():
    same = checks(2).expand(4, 3, 16, 16)
    groups = torch.tensor([7, 7, 3, 3])
    assert drift.diversity(drift.fingerprints(same), groups) == 0
    pair = torch.cat([plain(0, 0, 0), plain(1, 1, 1), plain(0, 0, 0), plain(0, 0, 0)])
    kept = drift.fingerprints(pair)
    assert kept.shape == (4, 3 * 8 * 8)
    # Standard deviations .5 and 0 of the two groups.
    assert drift.diversity(kept, groups) == pytest.approx(math.sqrt(0.125))
    assert math.isnan(drift.diversity(kept, torch.arange(4)))
    # A sample without siblings says nothing.
    assert drift.diversity(kept, torch.tensor([1, 1, 2, 3])) == pytest.approx(0.5)
    assert drift.fingerprints(torch.rand(2, 3, 512, 512)).shape == (2, 3 * 16 * 16)


def test_texts():
    # Quotients of small whole numbers in float32, rounded by 6e-8.
    texts = ("The cat and the dog", "", "ja ja ja ja")
    found = drift.statistics(texts)
    assert found["words"].tolist() == [5, 0, 4]
    assert found["distinct"].tolist() == pytest.approx([0.8, 1, 0.25])
    kept = drift.fingerprints(texts)
    assert drift.diversity(kept, torch.zeros(3)) == pytest.approx(1)
    same = drift.fingerprints(("a b", "B a", "a c", "d"))
    assert drift.diversity(same, torch.tensor([0, 0, 1, 1])) == pytest.approx(0.5)
    assert drift.diversity(same[:2], torch.tensor([0, 0])) == 0
    assert drift.diversity([[], []], torch.tensor([0, 0])) == 0


def test_names_of_metrics():
    assert drift.prefixed("eval_", torch.zeros(1, 3, 1, 1), {"x": 1.0}) == {"eval_image/x": 1.0}
    assert drift.prefixed("", ("a",), {"x": 1.0}) == {"text/x": 1.0}
