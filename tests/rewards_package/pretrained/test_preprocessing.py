"""Preprocessing to the bit, against the two libraries that published scores were computed with."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import RewardError
from rewards.pretrained.preprocessing import (
    CLIP_MEAN,
    Preprocessing,
    crop_centre,
    normalise,
    pad_to_square,
    read_preprocessing,
    resize,
    resize_shorter,
)

# Square and not, larger and smaller than the 56 pixels that the model sees, odd rests cut off.
SIZES = [
    (56, 56),
    (96, 96),
    (32, 32),
    (128, 77),
    (77, 128),
    (57, 59),
    (20, 31),
    (59, 56),
    (301, 90),
]


def random_images(height: int, width: int, n: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8)


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(array) for array in images.permute(0, 2, 3, 1).numpy()]


@pytest.mark.parametrize("size", SIZES)
def test_equal_to_transformers_pil_processor_to_the_bit(size):
    from transformers import CLIPImageProcessorPil

    images = random_images(*size)
    reference = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=56)
    wanted = reference(to_pil(images), return_tensors="pt").pixel_values
    found = Preprocessing(side=56, crop=56)(images)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("size", SIZES)
def test_equal_to_torchvision_as_open_clip_composes_it_to_the_bit(size):
    # open_clip itself, which composes the same, is compared in test_aesthetic.py.
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize, ToTensor

    images = random_images(*size)
    reference = Compose([Resize(56, InterpolationMode.BICUBIC), CenterCrop(56), ToTensor()])
    wanted = torch.stack([reference(image) for image in to_pil(images)])
    even = crop_centre(resize_shorter(images, 56), 56, "even")
    assert torch.equal(even.float() / 255, wanted)


def test_the_two_roundings_differ_where_they_should():
    column = torch.arange(10, dtype=torch.uint8).view(1, 1, 10, 1).expand(1, 3, 10, 7)
    first = [
        [crop_centre(column[..., :rows, :], 7, rounding)[0, 0, 0, 0].item() for rows in (8, 9, 10)]
        for rounding in ("down", "even")
    ]
    assert first == [[0, 1, 1], [0, 1, 2]]  # 0.5, 1 and 1.5 rows are cut off above


def test_every_step_of_255_is_normalised_as_in_float32():
    steps = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    mean, std = np.float32([0.5, 0.25, 0.4]), np.float32([0.5, 0.2, 0.3])
    wanted = (np.arange(256, dtype=np.float32) / np.float32(255) - mean[:, None]) / std[:, None]
    found = normalise(steps, mean.tolist(), std.tolist())
    assert np.array_equal(found[0, :, 0].numpy(), wanted)


def test_a_larger_side_than_the_crop():
    images = random_images(100, 140)
    found = Preprocessing(side=64, crop=32)(images)
    inner = Preprocessing(side=64, crop=64)(images)[..., 16:48, 16:48]
    assert torch.equal(found, inner)


def test_padding_centres_on_the_mean_colour():
    colour = [int(255 * mean) for mean in CLIP_MEAN]
    images = random_images(4, 9)
    for batch, turned in ((images, False), (images.transpose(-1, -2), True)):
        padded = pad_to_square(batch, colour)
        assert padded.shape == (2, 3, 9, 9)
        if turned:
            padded = padded.transpose(-1, -2)
        assert torch.equal(padded[..., 2:6, :], images)  # (9 - 4) // 2 rows above, 3 below
        margin = torch.cat([padded[..., :2, :], padded[..., 6:, :]], dim=-2)
        assert torch.equal(margin, torch.tensor(colour).view(3, 1, 1).expand(2, 3, 5, 9))
    assert torch.equal(pad_to_square(images[..., :4], colour), images[..., :4])


def test_resizing_to_the_same_size_changes_nothing():
    images = random_images(12, 15)
    assert torch.equal(resize(images, 12, 15), images)


@pytest.mark.parametrize(
    "config",
    [
        {"size": 48, "crop_size": 40},
        {"size": {"shortest_edge": 48}, "crop_size": {"height": 40, "width": 40}},
        {"size": 48, "crop_size": 40, "do_resize": True, "resample": 3, "do_convert_rgb": True},
    ],
)
def test_old_and_new_preprocessor_files(tmp_path, config):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({**config, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}))
    found = read_preprocessing(file)
    assert found == Preprocessing(side=48, crop=40, mean=(0.1, 0.2, 0.3), std=(1, 2, 3))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"resample": 2}',
        '{"do_center_crop": false}',
        '{"rescale_factor": 1}',
        '{"do_pad": true}',
        '{"size": {"height": 224, "width": 224}}',
        '{"crop_size": {"height": 224, "width": 200}}',
        '{"size": 200, "crop_size": 224}',
        '{"image_mean": [0.5]}',
        '{"image_mean": 0.5}',
    ],
)
def test_other_preprocessing_is_refused(tmp_path, text):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(text)
    with pytest.raises(RewardError, match=r"preprocessor_config\.json cannot be done here"):
        read_preprocessing(file)


def test_a_missing_preprocessor_file_is_told(tmp_path):
    with pytest.raises(RewardError, match="No such file"):
        read_preprocessing(tmp_path / "preprocessor_config.json")


def test_wrong_parameters():
    with pytest.raises(ValueError, match=r"Found `crop = 9` with `side = 8`\."):
        Preprocessing(side=8, crop=9)
    with pytest.raises(ValueError, match="Parameter `std` should be positive"):
        Preprocessing(side=8, crop=8, std=(1.0, 0.0, 1.0))
