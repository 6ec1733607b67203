"""The demonstration as `make demo` runs it, only smaller."""

from __future__ import annotations

import subprocess
from pathlib import Path

from PIL import Image

from moa_diffusion.storage.log import read_metrics
from waiting import HANG, python

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"trainer.groups": 2, "trainer.group_size": 2, "trainer.updates": 1}
SMALL |= {"evaluation.images_per_prompt": 1, "evaluation.prompts": 3, "evaluation.every": 2}
SMALL |= {"sampling.steps": 3, "sampling.window": 2, "evaluation.steps": 2}
SMALL |= {"rewards.ocr.workers": 0}  # processes that would import their libraries anew


def test_the_demo_draws_its_plot_and_continues(tmp_path: Path) -> None:
    command = [python(), str(ROOT / "scripts" / "demo.py")]
    command += [text for key, value in SMALL.items() for text in (f"--{key}", str(value))]
    for steps in (1, 2):
        done = subprocess.run(
            [*command, "--trainer.steps", str(steps)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=HANG,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        target = tmp_path / "runs" / "demo" / "demo.png"
        with Image.open(target) as plot:
            assert plot.width > 400
            assert len(plot.convert("RGB").getcolors(maxcolors=2**24)) > 1000
        target.unlink()
        for folder in target.parent.iterdir():
            if folder.is_dir():
                found = read_metrics(folder / "metrics.jsonl")
                assert [row["step"] for row in found] == list(range(steps + 1))
