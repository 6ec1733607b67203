"""The plot of the front."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from moa_diffusion.evaluation.records import ScoredSamples


def test_an_evaluation_leaves_a_plot(evaluated: tuple[Path, ScoredSamples]):
    output, _ = evaluated
    with Image.open(output / "pareto.png") as pareto:
        assert pareto.width > 600
        assert len(pareto.convert("RGB").getcolors(maxcolors=2**24)) > 100
