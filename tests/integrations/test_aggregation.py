"""Our objectives between another trainer's rewards and advantages: the same as in our trainer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from moa_diffusion import assembly
from moa_diffusion.config import check, from_dict
from moa_diffusion.integrations.aggregation import Aggregation
from moa_diffusion.objectives.apex import Apex
from moa_diffusion.objectives.mopo import Mopo
from moa_diffusion.objectives.normalize import GDPO, DualStage, Raw
from moa_diffusion.objectives.pama import Pama
from moa_diffusion.objectives.static import Static

NAMES = ("many_a", "short")


G = 4


CARRIED = ("static", "gdpo", "dual_stage", "apex", "chebyshev")


def red(images, prompts):
    return images[:, 0].mean((1, 2))


def green(images, prompts):
    return 40 * images[:, 1].mean((1, 2))


def sometimes(images, prompts):
    values = images[:, 2].mean((1, 2)).double()
    values[::3] = math.nan
    return values


def settings(folder: Path, method: str):
    """A toy run of ours with an objective that does not always apply."""
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("a\nb\nc\n")
    config = from_dict(
        {
            "output_dir": str(folder),
            "policy": {"name": "toy"},
            "sampling": {"steps": 2},
            "prompts": {"train": str(prompts), "heldout": str(prompts)},
            "rewards": {
                name: {"path": f"{__file__}:{name}"} for name in ("red", "green", "sometimes")
            },
            "objectives": {"method": method}
            | ({"weighting": {"warmup": 1}} if method == "apex" else {}),
            "optimizer": {"lr": 0.03},
            "trainer": {"steps": 4, "groups": 3, "group_size": G, "updates": 1},
            "checkpoint": {"every": 0},
            "evaluation": {"every": 0},
            "log": {"trackers": []},
        }
    )
    check(config)
    return config


def rollout(seed: int) -> tuple[list[str], torch.Tensor]:
    """Prompts and raw rewards of three groups, one without any spread, one partly NaN."""
    source = torch.Generator().manual_seed(seed)
    values = torch.randn(2, 3 * G, generator=source).double() * torch.tensor([[1.0], [300.0]])
    values[:, :G] = 2.5
    values[1, G : G + 2] = math.nan
    values[:, -1] = math.nan
    return [prompt for prompt in "abc" for _ in range(G)], values


def aggregation(normalizer: Any = DualStage, weighting: Any = Apex, **options: Any) -> Aggregation:
    return Aggregation(normalizer(NAMES), weighting(NAMES, **options))


@pytest.mark.parametrize("method", CARRIED)
def test_advantages_are_those_of_our_trainer(tmp_path, method):
    config = settings(tmp_path / "run", method)
    trainer = assembly.trainer(config)
    trainer.progress.bars = False
    trainer.run()
    ours = Aggregation(*assembly.objectives(config))
    limit = config.loss.advantage_clip
    files = sorted((tmp_path / "run" / "scores").iterdir())
    assert len(files) == 4
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows.sort(key=lambda row: (row["group"], row["sibling"]))
        values = torch.tensor(
            [
                [math.nan if row[f"reward/{k}"] is None else row[f"reward/{k}"] for row in rows]
                for k in config.rewards
            ]
        ).double()
        found = ours([row["prompt"] for row in rows], values, G)
        expected = torch.tensor([row["advantage"] for row in rows]).double()
        assert expected.abs().max() > 0.1
        # The file's are float32: 6e-8 of numbers up to 5.
        torch.testing.assert_close(found.clamp(-limit, limit), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalizer", [Raw, GDPO, DualStage])
@pytest.mark.parametrize("weighting", [Static, Apex, Pama])
def test_groups_have_mean_0_and_what_cannot_be_judged_has_0(normalizer, weighting):
    ours = aggregation(normalizer, weighting)
    advantages = ours(*rollout(0), G)
    assert advantages.abs().max() > 0.5
    assert advantages.view(-1, G).mean(1).abs().max() < 1e-12  # float64
    assert advantages[:G].abs().max() == 0
    assert advantages[-1] == 0


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("ddpo", "mean 0 in every group"),
        ("pama", "mean 0 in every group"),
        ("pama_vector", "mean 0 in every group"),
        ("mopo", "samples of the reference"),
        ("upgrad", "gradients"),
    ],
)
def test_methods_that_need_our_trainer_are_refused(tmp_path, method, reason):
    parts = assembly.objectives(settings(tmp_path / "run", method))
    with pytest.raises(ValueError, match=reason):
        Aggregation(*parts)


def test_every_method_is_either_carried_or_refused():
    gradient = {name for name, m in assembly.METHODS.items() if m.weighting.needs_gramian}
    refused = gradient | {"ddpo", "pama", "pama_vector", "mopo"}
    assert set(assembly.METHODS) == refused | set(CARRIED)


def test_options_can_make_a_method_one_that_is_refused():
    with pytest.raises(ValueError, match="Apex looks at the objectives' gradients"):
        aggregation(conflict="gradients")
    bounds = {"units": "reward", "bounds": {"short": 0.0}}
    with pytest.raises(ValueError, match="Mopo moves the weight of the KL"):
        aggregation(weighting=Mopo, **bounds)


def test_another_normalizer_whose_groups_have_other_means_is_found_out():
    class Shifted(GDPO):
        def combined(self, scores, rewards):
            return super().combined(scores, rewards) + 0.01

    with pytest.raises(ValueError, match=r"mean 0 in every group.*Found Shifted"):
        aggregation(Shifted)(*rollout(0), G)


def test_a_weighting_is_told_of_the_rollouts_before():
    class Clock(Static):
        steps: ClassVar[list[int]] = []

        def forward(self, stats):
            self.steps.append(stats.step)
            return super().forward(stats)

    weighting = Clock(NAMES)
    ours = Aggregation(DualStage(NAMES), weighting)
    for seed in range(3):
        ours(*rollout(seed), G)
    assert weighting.steps == [0, 1, 2]


@pytest.mark.parametrize(
    "prompts",
    [
        list("aaaabbb"),  # cut off
        list("aaabbbbb"),  # three and five
        list("abababab"),  # not side by side
    ],
)
def test_groups_have_to_be_whole(prompts):
    with pytest.raises(ValueError, match="Each prompt should have 4 completions, side by side"):
        aggregation()(prompts, torch.rand(2, len(prompts)).double(), G)


def test_a_saved_state_goes_on_exactly():
    straight, first = aggregation(warmup=1), aggregation(warmup=1)
    for seed in range(2):
        straight(*rollout(seed), G)
        first(*rollout(seed), G)
    resumed = aggregation(warmup=1)
    resumed.restore(first.state())
    assert resumed.state() == first.state()
    assert resumed.completed == 2
    for seed in range(2, 4):
        assert torch.equal(resumed(*rollout(seed), G), straight(*rollout(seed), G))
        assert resumed.metrics == pytest.approx(straight.metrics, rel=0, abs=0, nan_ok=True)
    assert resumed.metrics["weight/short"] != 0.5


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: aggregation(GDPO), r"parts \['DualStage', 'Apex'\]\. Found \['GDPO', 'Apex'\]"),
        (lambda: Aggregation(DualStage(NAMES[::-1]), Apex(NAMES[::-1])), "the objectives"),
        (lambda: aggregation(horizon=3), "Apex has other settings"),
    ],
)
def test_a_state_of_other_settings_is_refused(other, message):
    with pytest.raises(ValueError, match=message):
        aggregation().restore(other().state())
