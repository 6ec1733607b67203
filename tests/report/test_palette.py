"""Colours that are told apart with any colour vision."""

from __future__ import annotations

import itertools

import numpy
import pytest

from moa_diffusion.report.palette import COLOURS, SHAPES, marks

APART = 25.0  # CIE76
PAPERS = ("#ffffff", "#121417")  # of the page, light and dark
# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision
# Deficiency" (2009), severity 1; they apply to linear RGB.
VISIONS = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = numpy.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


def linear(colours: tuple[str, ...]) -> numpy.ndarray:
    """Linear RGB ``[n, 3]`` of ``#rrggbb``."""
    codes = numpy.array([list(bytes.fromhex(one[1:])) for one in colours]) / 255
    return numpy.where(codes <= 0.04045, codes / 12.92, ((codes + 0.055) / 1.055) ** 2.4)


def lab(rgb: numpy.ndarray) -> numpy.ndarray:
    """CIELAB ``[n, 3]`` of linear RGB, white at D65."""
    ratio = rgb @ TO_XYZ.T / TO_XYZ.sum(1)
    x, y, z = numpy.where(
        ratio > (6 / 29) ** 3, numpy.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29
    ).T
    return numpy.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


@pytest.mark.parametrize("vision", VISIONS)
def test_any_two_colours_are_told_apart(vision: str):
    seen = lab(numpy.clip(linear(COLOURS) @ numpy.array(VISIONS[vision]).T, 0, 1))
    distances = [
        float(numpy.linalg.norm(one - other)) for one, other in itertools.combinations(seen, 2)
    ]
    assert min(distances) > APART


def test_every_colour_stands_out_from_both_papers():
    light = linear((*COLOURS, *PAPERS)) @ TO_XYZ[1] + 0.05
    for paper in light[-2:]:
        contrast = numpy.maximum(light[:-2], paper) / numpy.minimum(light[:-2], paper)
        assert contrast.min() > 1.7


def test_a_name_keeps_its_mark_in_any_order():
    names = [f"run {i:02}" for i in range(len(COLOURS) + 1)]
    found = marks(names)
    assert marks(reversed(names)) == found
    assert len({(mark.colour, mark.marker) for mark in found.values()}) == len(names)
    assert len({symbol for _, symbol, _ in SHAPES}) == len(SHAPES)
