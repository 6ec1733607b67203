"""Statistics of outputs: by hand, and in the direction that they are named after."""

from __future__ import annotations

import math

import pytest
import torch

from moa_diffusion import drift


def plain(red: float, green: float, blue: float, side: int = 8) -> torch.Tensor:
    return torch.tensor([red, green, blue]).float()[None, :, None, None].expand(1, 3, side, side)


def checks(period: int, side: int = 16) -> torch.Tensor:
    """Black and white columns of ``period`` pixels."""
    column = (torch.arange(side) // period % 2).float()
    return column.expand(1, 3, side, side)


def test_images_by_hand():
    pictures = torch.cat([plain(1, 0, 0), plain(0.5, 0.5, 0.5), plain(0, 0, 0), plain(1, 0.5, 0.5)])
    found = drift.of_images(pictures)
    assert found["brightness"].tolist() == pytest.approx([0.299, 0.5, 0, 0.299 + 0.701 / 2])
    assert found["saturation"].tolist() == pytest.approx([1, 0, 0, 0.5])
    assert found["contrast"].tolist() == pytest.approx([0] * 4, abs=1e-6)
    assert found["high_frequency"].tolist() == [0] * 4
    fine, coarse = drift.of_images(checks(1)), drift.of_images(checks(8))
    assert float(fine["contrast"]) == float(coarse["contrast"]) == pytest.approx(0.5)
    assert float(fine["high_frequency"]) == pytest.approx(1)
    assert float(coarse["high_frequency"]) < 0.1


def test_a_pixel_is_a_picture():
    found = drift.of_images(torch.rand(3, 3, 1, 1))
    assert found["high_frequency"].tolist() == [0, 0, 0]
    assert found["contrast"].tolist() == [0, 0, 0]


def test_blur_takes_high_frequencies_away_and_noise_brings_them():
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 3, 32, 32, generator=generator)
    soft = torch.nn.functional.avg_pool2d(picture, 5, 1, 2)
    noisy = (soft + 0.1 * torch.randn(soft.shape, generator=generator)).clamp(0, 1)
    high = [float(drift.of_images(p)["high_frequency"]) for p in (soft, noisy, picture)]
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
