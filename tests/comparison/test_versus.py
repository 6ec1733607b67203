"""One method against others, on runs made by construction."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from written_runs import NAMES, UNITS, compared, gain, write_run

from moa_diffusion.comparison.read import read_run
from moa_diffusion.comparison.versus import paired_worst, reached, tables
from moa_diffusion.statistics.bootstrap import Estimate


def test_paired_runs_differ_by_what_their_worst_gains_do(tmp_path: Path) -> None:
    runs = []
    for method, seeds in {
        "apex": {1: gain(0.5, 1.0), 2: gain(0.75, 0.25), 3: gain(9, 9)},
        "static": {2: gain(-0.25, 1.0), 1: gain(1.0, 0.0)},
    }.items():
        for seed, end in seeds.items():
            folder = tmp_path / f"{method}-{seed}"
            write_run(folder, [end])
            runs.append(read_run(folder, method=method, seed=seed, names=NAMES))
    # Seed 1: .5 - 0; seed 2: .25 + .25; the third has no pair. Without noise nothing is unsure.
    found = paired_worst(runs, "apex", "static", UNITS)
    assert [found.value, found.low, found.high] == pytest.approx([0.5] * 3)
    with pytest.raises(ValueError, match="`apex` and `gdpo` should have runs of the same seed"):
        paired_worst(runs, "apex", "gdpo", UNITS)


def test_images_until_the_best_of_another_are_counted(tmp_path: Path) -> None:
    found = compared(
        tmp_path,
        {  # worst gains .2, .1, -1 and 0, .3, .4 and -.1 twice
            "static": [[gain(0.2, 1.0), gain(0.1, 1.0), gain(-1.0, 2.0)]],
            "apex": [[gain(0.0, 0.0), gain(0.3, 0.3), gain(0.4, 0.5)]],
            "mopo": [[gain(-0.1, 1.0), gain(-0.1, 2.0)]],
        },
    )
    images = {"static": 10, "apex": 10, "mopo": 20}
    worst = {one.method: one for one in reached(found, "static", images=images, volume=False)}
    assert (worst["static"].best, worst["static"].at, worst["static"].until) == (
        pytest.approx(0.2),
        150,
        150,
    )
    assert (worst["apex"].best, worst["apex"].at) == (pytest.approx(0.4), 450)
    assert worst["apex"].until == 300
    assert (worst["mopo"].at, worst["mopo"].until) == (300, None)
    # Volumes so far: static .2 at once, apex .09 and then .2, mopo none.
    volumes = {one.method: one for one in reached(found, "static", images=images, volume=True)}
    assert volumes["static"].until == 150
    assert volumes["apex"].best == pytest.approx(0.2)
    assert volumes["apex"].until == 450
    assert volumes["mopo"].until is None
    differences = {"static": Estimate(value=0.5, low=0.25, high=0.75)}
    text = tables(differences, "apex", {"worst gain": list(worst.values())}, "static")
    assert "+0.50 [+0.25, +0.75]" in text
    assert re.search(r"\| apex +\| +\+0.400 \| +450 \| +300 \|", text)
    assert re.search(r"\| mopo +\| +-0.100 \| +300 \| +never \|", text)
    assert "static's best worst gain is +0.200" in text
