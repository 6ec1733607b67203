"""What images in a batch must be."""

from __future__ import annotations

import pytest
import torch

from rewards.pixels import check_images

GOOD = torch.linspace(0, 1, 2 * 3 * 4 * 5).reshape(2, 3, 4, 5)


def test_images_in_range_pass():
    check_images(GOOD, 2)
    check_images(torch.zeros(0, 3, 4, 5), 0)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (GOOD.numpy(), "should be a tensor. Found ndarray"),
        (GOOD[:1], r"with N = 2 prompts\. Found \[1, 3, 4, 5\]"),
        (GOOD[:, :1], r"Found \[2, 1, 4, 5\]"),
        (GOOD.double(), "should be float32. Found torch.float64"),
        (GOOD[..., :0], "should have pixels"),
        (GOOD * 255, r"from 0 to .* in sample 0"),
        (GOOD.index_fill(0, torch.tensor([1]), float("nan")), "from nan to nan in sample 1"),
    ],
)
def test_others_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        check_images(images, 2)
