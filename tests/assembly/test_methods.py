"""Weightings, normalizers and samplers by name and by import path: they train, or say why not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from sections import sd3_policy

from moa_diffusion import assembly, tiny
from moa_diffusion.assembly.methods import check_ppo, own_code, sampler_of
from moa_diffusion.config import Config, check, from_dict, schema
from moa_diffusion.config.schema import ForwardConfig, GradientsConfig, LossConfig
from moa_diffusion.objectives.normalize import GDPO, DualStage
from moa_diffusion.policies import samplers
from moa_diffusion.policies.sd3 import load_pipeline
from moa_diffusion.storage.log import read_metrics
from moa_diffusion.types import ConfigError, Request

OWN = '''
"""What a user writes."""

import torch
from moa_diffusion.objectives.base import Weighting
from moa_diffusion.objectives.gradient import Gradient
from moa_diffusion.objectives.normalize import GDPO
from moa_diffusion.policies.samplers import Step, flow_sde


class First(Weighting):
    """The first objective counts ``factor`` times as much as the others."""

    def __init__(self, objectives, factor=1.0):
        super().__init__(objectives)
        self.factor = factor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, stats):
        self.calls += 1
        weights = torch.ones(len(self.objectives), dtype=torch.float64)
        weights[0] = self.factor
        return weights

    def report(self):
        return {"first/calls": float(self.calls)}


class Weighted(First):
    """Multiplies the weights of ``rewards``."""

    def __init__(self, objectives, weights):
        super().__init__(objectives, factor=weights[0])


class Halved(GDPO):
    def per_objective(self, rewards):
        return super().per_objective(rewards) / 2


def step(s, s_next, *, noise_level, s_second):
    return flow_sde(s, s_next, noise_level=noise_level, s_second=s_second)


def still(s, s_next, *, noise_level, s_second):
    return Step(1.0, s_next - s, 0.0, s - s_next)


number = 3


def red(images, prompts):
    return images[:, 0].mean((1, 2))


def green(images, prompts):
    return images[:, 1].mean((1, 2))
'''


@pytest.fixture
def mine(tmp_path: Path) -> str:
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    return str(file)


def settings(folder: Path, mine: str, **objectives: Any) -> Config:
    prompts = folder / "prompts.txt"
    prompts.write_text("a\nb\n")
    values = {
        "output_dir": str(folder / "run"),
        "resume": objectives.pop("resume", None),
        "policy": {"name": "toy"},
        "sampling": {"steps": 2},
        "prompts": {"train": str(prompts)},
        "rewards": {name: {"path": f"{mine}:{name}"} for name in ("red", "green")},
        "objectives": {"method": f"{mine}:First"} | objectives,
        "loss": {"clip_range": 0.2},
        "optimizer": {"lr": 0.03},
        "trainer": {"groups": 2, "group_size": 4, "updates": 1, "steps": 2},
        "checkpoint": {"every": 1},
        "evaluation": {"every": 0},
        "log": {"trackers": []},
    }
    config = from_dict(values)
    check(config)
    return config


def test_a_weighting_of_ones_own_trains_and_resumes(tmp_path: Path, mine: str) -> None:
    config = settings(tmp_path, mine, weighting={"factor": 3.0})
    assembly.trainer(config).run()
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["weight/red"] for row in rows] == [0.75, 0.75]
    assert [row["first/calls"] for row in rows] == [1, 2]
    assert rows[-1]["policy/grad_norm"] > 0
    resumed = assembly.trainer(settings(tmp_path, mine, weighting={"factor": 3.0}, resume="latest"))
    assert float(resumed.learner.weighting.calls) == 2  # type: ignore[attr-defined]
    assert resumed.learner.facts() == {"method": ["DualStage", "First"]}
    with pytest.raises(ConfigError, match=r"method \['DualStage', 'First'\]\. Found .*'Weighted'"):
        assembly.trainer(settings(tmp_path, mine, method=f"{mine}:Weighted", resume="latest"))


def test_a_weighting_takes_the_rewards_weights_if_it_has_the_parameter(
    tmp_path: Path, mine: str
) -> None:
    config = settings(tmp_path, mine, method=f"{mine}:Weighted")
    config.rewards["red"]["weight"] = 4.0
    _, weighting = assembly.objectives(config)
    assert weighting.factor == 4.0


@pytest.mark.parametrize(
    ("loss", "key"),
    [
        (LossConfig(norm_weight=0.5), r"loss\.norm_weight: .* WinRate .* Found 0\.5"),
        (
            LossConfig(kind="forward", forward=ForwardConfig(preset="awm")),
            r"loss\.forward\.average\.weight: .* Or set gradients\.mode: probe",
        ),
    ],
)
def test_penalties_of_another_unit_than_the_advantages_are_refused(
    tmp_path: Path, mine: str, loss: LossConfig, key: str
) -> None:
    """Before a rollout, and only where weights are solved at every optimizer step."""
    pytest.importorskip("torchjd.aggregation")
    own = {"path": "moa_diffusion.objectives.win_rate:WinRate"}
    plain = settings(tmp_path, mine, method="mgda", normalizer=own)
    config = dataclasses.replace(plain, loss=loss)
    with pytest.raises(ConfigError, match=key):
        assembly.objectives(config)
    assembly.objectives(plain)
    assembly.objectives(dataclasses.replace(config, gradients=GradientsConfig(mode="probe")))
    whitened = dataclasses.replace(plain.objectives, normalizer={})
    assembly.objectives(dataclasses.replace(config, objectives=whitened))


def test_a_normalizer_of_ones_own_takes_its_options(tmp_path: Path, mine: str) -> None:
    own = {"path": f"{mine}:Halved", "eps": 0.5}
    normalizer, _ = assembly.objectives(settings(tmp_path, mine, normalizer=own))
    assert isinstance(normalizer, GDPO)
    assert type(normalizer).__name__ == "Halved"
    assert normalizer.eps == 0.5
    built_in = {"path": "moa_diffusion.objectives.normalize:GDPO"}  # in the place of the method's
    normalizer, _ = assembly.objectives(
        settings(tmp_path, mine, method="apex", normalizer=built_in)
    )
    assert type(normalizer) is GDPO
    assert type(assembly.objectives(settings(tmp_path, mine))[0]) is DualStage


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ({"method": "dualstage"}, r"^objectives\.method: unknown method .*'dual_stage'.* static, "),
        ({"method": "dualstage"}, r"or an import path such as my_module:MyWeighting"),
        ({"method": "no.py:First"}, r"^objectives\.method: Weighting path .*there is no file"),
        ({"method": "no_such:First"}, r"there is no module `no_such`.*path/to/file\.py"),
        ({"method": "MINE:Frist"}, r"has no attribute `Frist`\. Did you mean 'First'\?"),
        ({"method": "MINE:number"}, r"subclass of moa_diffusion\.objectives\.base\.Weighting"),
        ({"method": "MINE:Halved"}, r"^objectives\.method: should name a subclass of .*Weighting"),
        ({"normalizer": {"path": "MINE:First"}}, r"^objectives\.normalizer\.path: .*Normalizer"),
        ({"normalizer": {"path": 3}}, r"^objectives\.normalizer\.path: should be text\. Found 3"),
        (
            {"weighting": {"factr": 2}},
            r"^objectives\.weighting\.factr: unknown option of First\. Did you mean 'factor'",
        ),
        (
            {"normalizer": {"path": "MINE:Halved", "epsilon": 1}},
            r"^objectives\.normalizer\.epsilon: unknown option of Halved",
        ),
    ],
)
def test_what_is_no_method_is_refused_by_its_key(
    tmp_path: Path, mine: str, objectives: dict[str, Any], message: str
) -> None:
    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: placed(one) for key, one in value.items()}
        return value.replace("MINE", mine) if isinstance(value, str) else value

    with pytest.raises(ConfigError, match=message):
        assembly.objectives(settings(tmp_path, mine, **placed(objectives)))


def test_a_method_of_ones_own_does_not_weigh_decisions(tmp_path: Path, mine: str) -> None:
    config = settings(tmp_path, mine)
    config.loss.kind = "ppo"
    with pytest.raises(ConfigError, match=r"^loss\.kind: should be grpo .*static, "):
        check_ppo(config)


def test_processes_compare_the_files_that_hold_own_code(tmp_path: Path, mine: str) -> None:
    config = settings(tmp_path, mine, normalizer={"path": f"{mine}:Halved"})
    config.sampling.sampler = f"{mine}:step"
    code = own_code(config)
    assert set(code) == {"objectives.method", "objectives.normalizer.path", "sampling.sampler"}
    assert code["objectives.method"]["module"] == "mine"
    assert len({one["source_sha256"] for one in code.values()}) == 1
    assert own_code(settings(tmp_path, mine, method="apex")) == {}


# ---------------------------------------------------------------------- samplers


def test_the_names_of_samplers_are_those_of_the_configuration() -> None:
    assert tuple(samplers.SAMPLERS) == schema.SAMPLERS


def test_a_sampler_of_ones_own_draws_as_the_one_that_it_is(tmp_path: Path, mine: str) -> None:
    config = settings(tmp_path, mine)
    config.sampling.sampler = f"{mine}:step"
    check(config)
    options = {"resolution": 32, "steps": 3, "max_sequence_length": 16, "lora_rank": 4}
    request = Request(prompt="a red sign", seed=1)
    log_probs = []
    for sampler in (None, sampler_of(config)):
        pipeline = load_pipeline(str(tiny.PIPELINE_PATH))
        policy = sd3_policy(pipeline, sampler_function=sampler, **options)
        policy.prepare([request.prompt])
        log_probs.append(policy.sample([request], step=0).log_probs)
    assert torch.equal(*log_probs)
    with pytest.raises(ValueError, match=r"`sampler` should return a Step whose `std` is positive"):
        config.sampling.sampler = f"{mine}:still"
        sd3_policy(
            load_pipeline(str(tiny.PIPELINE_PATH)), sampler_function=sampler_of(config), **options
        )


@pytest.mark.parametrize("name", ["number", "First"])
def test_what_is_no_sampler_is_refused(tmp_path: Path, mine: str, name: str) -> None:
    config = settings(tmp_path, mine)
    config.sampling.sampler = f"{mine}:{name}"
    with pytest.raises(ConfigError, match=r"^sampling\.sampler: should name a function"):
        sampler_of(config)
