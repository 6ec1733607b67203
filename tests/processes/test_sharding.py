"""A transformer split over two processes samples and learns what a whole one does.

Run as a script, this file is one of the two processes.
"""

from __future__ import annotations

import copy
import functools
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sections import sd3_policy
from torch.distributed.tensor import DTensor

from moa_diffusion import tiny
from moa_diffusion.policies import lora
from moa_diffusion.policies.sd3 import SD3Policy, load_pipeline
from moa_diffusion.processes import sharding
from moa_diffusion.storage.log import read_metrics
from moa_diffusion.types import Request
from waiting import HANG, two_processes

PROMPTS = ['a red sign that says "GO"', "a blue circle on a white background"]
SMALL = {"resolution": 16, "steps": 3, "window": 2, "guidance": 1.0, "lora_rank": 4}
SMALL |= {"max_sequence_length": 16, "eval_steps": 2, "eval_guidance": 1.0}
# Without and with checkpointing.
CASES = (("float32", False), ("bfloat16", True))
# One draws a reference pool, the other measures gradients on some micro-batches.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "mopo": {"method": "mopo", "normalizer": {"pool_size": 3}},
    "apex": {"method": "apex", "weighting": {"warmup": 1, "conflict": "gradients"}},
}


def red(images, prompts):
    return images[:, 0].mean((1, 2))


def green(images, prompts):
    return images[:, 1].mean((1, 2)) - 0.5 * images[:, 0].mean((1, 2))


def train(folder: Path, objectives: dict[str, Any], *, shard: bool) -> dict[str, Any]:
    """One rollout; three held-out prompts, of which one process has a batch more."""
    from moa_diffusion import assembly
    from moa_diffusion.config import check, from_dict

    config = from_dict(
        {
            "output_dir": str(folder),
            "policy": {"max_sequence_length": 16, "shard": shard},
            "sampling": {"resolution": 16, "steps": 3, "guidance": 1.0, "shared_start": True},
            "prompts": {name: str(folder.parent / "prompts.txt") for name in ("train", "heldout")},
            "rewards": {name: {"path": f"{__file__}:{name}"} for name in ("red", "green")},
            "objectives": objectives,
            "gradients": {"share": 0.1},  # one pass, of one process
            "loss": {"kl_weight": 0.01, "clip_range": 0.2},
            "optimizer": {"lr": 0.003},
            "trainer": {
                "steps": 1,
                "groups": 2,
                "group_size": 2,
                "updates": 1,
                "sample_batch": 2,
                "micro_batch": 1,
            },
            "evaluation": {"every": 1, "steps": 2, "images_per_prompt": 1, "rollout_images": 3},
            "log": {"trackers": []},
        }
    )
    check(config)
    run = assembly.trainer(config, pipeline_in("float32"))
    run.progress.bars = False
    run.run()
    return run.state_dict() if run.comm.rank == 0 else {}


@functools.cache
def loaded(dtype: str) -> Any:
    """The shipped model with two of its blocks: one with both attentions, and the last."""
    pipeline = load_pipeline(str(tiny.PIPELINE_PATH), dtype=dtype)
    first, *_, last = pipeline.transformer.transformer_blocks
    pipeline.transformer.transformer_blocks = torch.nn.ModuleList([first, last])
    return pipeline


def pipeline_in(dtype: str) -> Any:
    return copy.deepcopy(loaded(dtype))


def policy_in(dtype: str, **options: Any) -> SD3Policy:
    policy = sd3_policy(pipeline_in(dtype), seed=0, **(SMALL | options))
    policy.prepare(PROMPTS)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from the start, where B is zero
        for parameter in policy.trainable().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=source))
    return policy


def learn(policy: SD3Policy, **options: Any) -> dict[str, Any]:
    """What a policy draws, and the gradients of its log-probs and KL."""
    requests = [Request(prompt=PROMPTS[i], group=i, seed=100 + i) for i in range(2)]
    rollout = policy.sample(requests, step=0)
    log_probs, kl, *_ = policy.log_probs(rollout, slice(0, 2), with_kl=True)
    assert kl is not None
    weights = torch.linspace(-1, 1, 4).view(2, 2)
    torch.autograd.backward((weights * log_probs).sum() + kl.sum())
    return {
        "images": rollout.images,
        "latents": rollout.trace["latents"],
        "sampled": rollout.log_probs,
        "log_probs": log_probs.detach(),
        "kl": kl.detach(),
        "gradients": {name: p.grad for name, p in policy.trainable().items()},
        "evaluated": policy.generate(requests).outputs,
    }


def main(folder: Path) -> None:
    signal.alarm(int(HANG))  # a collective that waits for ever ends here
    dist.init_process_group("gloo")
    attach = lora.attach  # the whole one shall have no merged weights either
    lora.attach = lambda *given, **options: attach(*given, **(options | {"merge": False}))
    for dtype, checkpointing in CASES:
        options = {"gradient_checkpointing": checkpointing}
        whole = policy_in(dtype, **options)
        split = policy_in(dtype, **options, shard=True)
        of_base = [p for p in split.transformer.parameters() if not p.requires_grad]
        mine = sum(p.to_local().numel() for p in of_base if isinstance(p, DTensor))
        found = {
            "whole": learn(whole),
            "split": learn(split),
            "share": mine / sum(p.numel() for p in of_base),
            "trained": [type(p) for p in split.trainable().values()],
        }
        torch.save(found, folder / f"{dtype}-{checkpointing}-{dist.get_rank()}.pt")
    for name, objectives in OBJECTIVES.items():
        for shard in (False, True):
            state = train(folder / f"{name}-{shard}", objectives, shard=shard)
            if state:
                torch.save(state["updater"]["trainable"], folder / f"{name}-{shard}.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left."""
    folder = tmp_path_factory.mktemp("split")
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS, "a green square"]))
    two_processes(__file__, folder)
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("dtype", "checkpointing"), CASES)
def test_a_split_transformer_does_what_a_whole_one_does(
    both: Path, dtype: str, checkpointing: bool, rank: int
) -> None:
    """To the bit: the same products of the same matrices."""
    found = torch.load(both / f"{dtype}-{checkpointing}-{rank}.pt", weights_only=False)
    assert 0.45 < found["share"] < 0.55
    assert set(found["trained"]) == {torch.nn.Parameter}
    whole, split = found["whole"], found["split"]
    gradients = whole.pop("gradients"), split.pop("gradients")
    assert sum(bool(gradient.any()) for gradient in gradients[0].values()) > 25
    for one, other in ((whole, split), gradients):
        assert one.keys() == other.keys()
        for name, values in one.items():
            assert torch.equal(other[name], values), name


@pytest.mark.parametrize("method", OBJECTIVES)
def test_a_run_with_a_split_transformer_is_that_with_a_whole_one(both: Path, method: str) -> None:
    """Also where the processes have more or fewer passes to make: none waits for the other."""
    whole, split = (torch.load(both / f"{method}-{shard}.pt") for shard in (False, True))
    assert all(torch.equal(split[name], values) for name, values in whole.items())
    rows = [
        [
            {name: value for name, value in row.items() if not name.startswith("seconds")}
            for row in read_metrics(both / f"{method}-{shard}" / "metrics.jsonl")
        ]
        for shard in (False, True)
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 2  # before it and after it


def test_nodes_share_within_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    monkeypatch.setattr(sharding, "init_device_mesh", lambda *given, **_: made.append(given))
    for local in ("8", "4", "1", "3"):
        sharding._mesh(torch.device("cpu"), {"LOCAL_WORLD_SIZE": local})
    assert made == [("cpu", (8,)), ("cpu", (2, 4)), ("cpu", (8,)), ("cpu", (8,))]


def test_one_process_alone_has_nobody_to_share_with() -> None:
    with pytest.raises(RuntimeError, match="of a group only"):
        sharding.shard_frozen(torch.nn.Linear(2, 2), [], torch.device("cpu"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
