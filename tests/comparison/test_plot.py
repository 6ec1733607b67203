"""The plot of a comparison."""

from __future__ import annotations

import math
from pathlib import Path

import numpy
import pytest
from PIL import Image
from written_runs import write_run

from moa_diffusion.comparison.plot import (
    OUTLIER,
    mean_path,
    plot_comparison,
    window,
)
from moa_diffusion.comparison.read import read_run
from moa_diffusion.comparison.results import (
    compare,
)


def test_an_axis_leaves_outliers_out_and_holds_all_others() -> None:
    ends = numpy.array([[-0.5, 0.1], [-0.2, 1.0], [0.3, 0.9], [-30.0, -10.0], [math.nan] * 2])
    low, high = window(ends)
    assert -0.6 < low < -0.5
    assert 1.0 < high < 1.1
    near = ends[:3] * [[1], [1], [OUTLIER / 2]]
    low, high = window(near)
    assert low < near.min()
    assert high > near.max(), "within so many medians there is no outlier"
    assert window(ends[4:]) == window(numpy.zeros((2, 2))) == (-1.0, 1.0)


@pytest.mark.parametrize(("methods", "objectives"), [(10, 4), (1, 2)])
def test_the_plot_is_drawn(tmp_path: Path, methods: int, objectives: int) -> None:
    random = numpy.random.default_rng(0)
    names = ["ocr", "jpeg_compressibility", "colourfulness", "prompt_colour"][:objectives]
    found = []
    for number in range(methods):
        for seed in range(3):
            folder = tmp_path / f"{number}-{seed}"
            last = random.normal(0.3, 0.7, objectives)
            gains = [
                dict(zip(names, f * last + random.normal(0, 0.1, objectives), strict=True))
                for f in (0.5, 0.8, 1.0)[: 3 - seed % 2]  # the runs end at different steps
            ]
            write_run(folder, gains, noise=0.8, seed=seed, prompts=12)
            found.append(read_run(folder, method=f"method_{number}", seed=seed, names=names))
    comparison = compare(found, resamples=200)
    path = mean_path(
        [run for run in comparison.runs if run.method == "method_0"], (names[0], names[1])
    )
    assert path.shape == (3, 2)  # base, step 15, ends
    plot_comparison(comparison, found, tmp_path / "compare.png")
    with Image.open(tmp_path / "compare.png") as drawn:
        assert drawn.width > 1000
        assert len(drawn.convert("RGB").getcolors(maxcolors=2**24)) > 100
