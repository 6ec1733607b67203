"""What `accelerate launch` and an empty command line lead to."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from moa_diffusion.processes.launcher import check_launcher, make_accelerator, unused
from moa_diffusion.types import ConfigError

PLAIN = {  # what `accelerate launch` sets without any choice of the user's
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_USE_CPU": "False",
}


def accelerator(kind: DistributedType = DistributedType.MULTI_GPU) -> SimpleNamespace:
    return SimpleNamespace(distributed_type=kind, num_processes=4)


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        (
            {
                "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
                "PARALLELISM_CONFIG_TP_SIZE": "2",
                "PARALLELISM_CONFIG_CP_SIZE": "1",
            },
            "tp_size 2 in",
        ),
    ],
)
def test_what_splits_the_model_is_refused_by_name(environment, name):
    with pytest.raises(ConfigError, match=rf"^launcher: .*{name}.*--nproc_per_node 4") as caught:
        check_launcher(accelerator(), PLAIN | environment)
    assert "pip" not in str(caught.value)
    assert unused("float32", PLAIN | environment) == []


def test_a_tpu_is_refused_and_plain_processes_are_not():
    with pytest.raises(ConfigError, match="Found TPU"):
        check_launcher(accelerator(DistributedType.XLA), PLAIN)
    check_launcher(accelerator(), PLAIN)
    check_launcher(accelerator(DistributedType.NO), {})


def test_processes_that_do_not_find_each_other_are_refused():
    """They would be so many runs in one folder."""
    alone = SimpleNamespace(distributed_type=DistributedType.NO, num_processes=1)
    with pytest.raises(ConfigError, match=r"^launcher: .*Found 2 .*ACCELERATE_USE_CPU=true"):
        check_launcher(alone, {"WORLD_SIZE": "2"})
    check_launcher(alone, {"WORLD_SIZE": "1"})
    check_launcher(accelerator(DistributedType.MULTI_CPU), {"WORLD_SIZE": "4"})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MIXED_PRECISION", "bf16", "mixed_precision bf16: policy.dtype rules, which is float16"),
        ("MIXED_PRECISION", "fp8", "mixed_precision fp8: policy.dtype rules"),
        ("MIXED_PRECISION", "fp16", None),
        ("MIXED_PRECISION", "no", None),
        ("DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend inductor: nothing is compiled"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "trainer.updates and trainer.micro_batch rule"),
        ("GRADIENT_ACCUMULATION_STEPS", "1", None),
        ("GRADIENT_CLIPPING", "1.0", "optimizer.max_grad_norm rules"),
    ],
)
def test_what_is_not_used_is_said_with_the_key_that_rules(name, value, said):
    found = unused("float16", PLAIN | {f"ACCELERATE_{name}": value})
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_settings_of_engines_do_not_reach_accelerate(monkeypatch):
    """It would demand DeepSpeed before anything here could say a word."""
    for name, value in (("USE_DEEPSPEED", "true"), ("GRADIENT_ACCUMULATION_STEPS", "auto")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert make_accelerator().num_processes == 1
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"
