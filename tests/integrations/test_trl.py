"""Our objectives inside TRL's trainer: the same advantages, and what TRL cannot carry is refused.

Run as a script, this file is one of two processes that train with TRL.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moa_diffusion.integrations.aggregation import Aggregation
from moa_diffusion.integrations.trl import MultiObjective
from moa_diffusion.objectives.apex import Apex
from moa_diffusion.objectives.normalize import GDPO, DualStage
from moa_diffusion.objectives.static import Static
from waiting import HANG, two_processes

pytestmark = pytest.mark.filterwarnings(  # TRL asks transformers by the old names
    r"ignore:`(is_)?gradient_checkpointing(_enable|_disable)?` is deprecated:FutureWarning"
)


NAMES = ("many_a", "short")


G = 4


LETTERS = "abcdefgh "


# ---------------------------------------------------------------------- without TRL


def test_objectives_have_to_agree():
    with pytest.raises(ValueError, match=r"normalizer's objectives \('a', 'b'\)"):
        Aggregation(GDPO(("a", "b")), Static(("b", "a")))
    with pytest.raises(ValueError, match="`normalizer` should have the objectives"):
        MultiObjective({"a": len, "b": len}, normalizer=GDPO(("a",)), weighting=Static(("a",)))


def test_what_trl_takes_but_is_no_plain_function_is_refused():
    async def later(**columns):
        return [0.0]

    for function in ("a/model", torch.nn.Linear(1, 1), later):
        with pytest.raises(ValueError, match=r"should hold plain functions.*for 'x'"):
            MultiObjective({"x": function}, normalizer=GDPO("x"), weighting=Static("x"))


def test_without_trl_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r'pip install "moa-diffusion\[trl\]"'):
        reward_function().callback()


def test_a_trainer_without_the_callback_is_told_so():
    with pytest.raises(RuntimeError, match=r"callbacks=\[reward.callback\(\)\]"):
        reward_function()(prompts=[], completions=[], log_metric=print, log_extra=print)


# ---------------------------------------------------------------------- with TRL


def many_a(prompts, completions, **columns):
    return [text.count("a") / 8 for text in completions]


def short(prompts, completions, **columns):
    pairs = zip(prompts, completions, strict=True)
    return [None if prompt == "b" else -100.0 * len(text) for prompt, text in pairs]


def reward_function(**functions: Any) -> MultiObjective:
    functions = functions or {"many_a": many_a, "short": short}
    names = tuple(functions)
    return MultiObjective(functions, normalizer=DualStage(names), weighting=Apex(names, warmup=1))


def grpo_config(folder: Path, **changes: Any):
    from trl import GRPOConfig

    options: dict[str, Any] = {
        "scale_rewards": "none",
        "num_generations": G,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 8,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "per_device_eval_batch_size": 4,
        "log_completions": True,
        "learning_rate": 1e-2,
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
    }
    return GRPOConfig(output_dir=str(folder), **options | changes)


def grpo_trainer(folder: Path, reward: MultiObjective, *others: Any, **changes: Any):
    """A Llama of 12 letters and random weights."""
    from datasets import Dataset
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOTrainer

    words = {text: i for i, text in enumerate(["<pad>", "<s>", "</s>", *LETTERS])}
    letters = Tokenizer(models.WordLevel(words, unk_token=" "))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.decoder = decoders.Fuse()
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    prompts = Dataset.from_list([{"prompt": letter} for letter in "abcdefgh"])
    return GRPOTrainer(
        LlamaForCausalLM(shape),
        reward_funcs=[reward, *others],
        callbacks=[reward.callback()],
        args=grpo_config(folder, **changes),
        train_dataset=prompts,
        eval_dataset=prompts.select(range(2)),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=letters,
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            padding_side="left",
        ),
    )


def check_advantages(folder: Path, steps: int) -> None:
    """TRL's own table of completions against ours, replayed on the rewards in it."""
    import pandas

    replayed = reward_function().aggregation
    for step in range(1, steps + 1):
        table = pandas.read_parquet(folder / "completions" / f"completions_{step:05d}.parquet")
        assert len(table) == 2 * G
        raw = torch.tensor(table[[f"reward/{name}" for name in NAMES]].to_numpy(dtype=float)).T
        expected = replayed(table["prompt"].tolist(), raw, G)
        assert expected.abs().max() > 0.1
        found = torch.tensor(table["advantage"].to_numpy(dtype=float))
        # Through TRL's float32: 6e-8 of numbers up to some 3.
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def trl() -> Any:
    return pytest.importorskip("trl", reason="trl is not installed")


def test_a_run_of_trl_trains_on_our_advantages_and_resumes_exactly(trl, tmp_path):
    reward = reward_function()
    trainer = grpo_trainer(tmp_path / "run", reward)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    check_advantages(tmp_path / "run", steps=3)  # the fourth file is the evaluation's
    assert reward.aggregation.completed == 4, "an evaluation should not count"
    last = [row for row in trainer.state.log_history if "weight/short" in row][-1]
    assert last["step"] == 4
    assert last["weight/short"] == pytest.approx(reward.metrics["weight/short"])
    assert last["weight/short"] != pytest.approx(0.5)
    (evaluated,) = (row for row in trainer.state.log_history if "eval_loss" in row)
    assert evaluated["eval_reward_mean/short"] < -100
    assert "eval_weight/short" not in evaluated

    for restore in (False, True):  # True: transformers makes the callback anew
        again = reward_function()
        resumed = grpo_trainer(
            tmp_path / f"again-{restore}", again, restore_callback_states_from_checkpoint=restore
        )
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        assert again.aggregation.state() == reward.aggregation.state()
        after = zip(before, trainer.model.parameters(), resumed.model.parameters(), strict=True)
        for old, straight, other in after:
            assert torch.equal(straight, other)
            assert not torch.equal(straight, old)

    path = tmp_path / "run" / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["MultiObjectiveCallback"]
    path.write_text(json.dumps(state))
    foreign = grpo_trainer(tmp_path / "foreign", reward_function())
    with pytest.raises(ValueError, match="should be of a run with the callback"):
        foreign.train(resume_from_checkpoint=str(path.parent))


def test_another_reward_function_beside_it_is_found_out(trl, tmp_path):
    trainer = grpo_trainer(tmp_path, reward_function(), many_a, save_strategy="no")
    with pytest.raises(ValueError, match=r"alone.*rewards/advantage/mean, rewards/many_a"):
        trainer.train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_rewards": "group"}, "`scale_rewards` of GRPOConfig should be 'none'"),
        ({"scale_rewards": True}, "Found 'group'"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "Found 'normalize_then_sum'"),
        ({"reward_weights": [0.5]}, r"`reward_weights` of GRPOConfig.*Found \[0.5\]"),
    ],
)
def test_settings_that_would_change_advantages_are_refused(trl, tmp_path, changes, message):
    args = grpo_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        reward_function().callback().on_init_end(args, None, None)


def test_another_trainer_is_refused(trl):
    with pytest.raises(TypeError, match=r"GRPOTrainer\. Found a trainer whose settings are Simple"):
        reward_function().callback().on_init_end(SimpleNamespace(), None, None)


def call(reward: MultiObjective, folder: Path, prompts: list[Any], **columns: Any):
    """As TRL calls it in a training step; returns what it logged as well."""
    callback = reward.callback()
    callback.on_init_end(grpo_config(folder, scale_rewards=False), None, None)
    callback.on_step_begin(None, None, None)
    metrics: dict[str, float] = {}
    extra: dict[str, list[float]] = {}
    completions = ["x" * i for i in range(len(prompts))]
    found = reward(
        prompts=prompts,
        completions=completions,
        log_metric=metrics.__setitem__,
        log_extra=extra.__setitem__,
        **columns,
    )
    return found, metrics, extra


def test_none_and_nan_do_not_apply(trl, tmp_path):
    rewards: Mapping[str, Any] = {
        "column": lambda score, **columns: score,
        "half": lambda prompts, **columns: [None, math.nan, None, None, 1, 2, 3, True],
    }
    score = [1.0, 2.0, 3.0, 4.0, 1.0, 1.0, 1.0, 1.0]
    chat = [[{"role": "user", "content": text}] for text in "aaaabbbb"]
    found, metrics, extra = call(reward_function(**rewards), tmp_path, chat, score=score)
    assert metrics["applies/half"] == 0.5
    assert metrics["reward_mean/half"] == 7 / 4
    assert extra["reward/column"] == score
    assert found[:4] == sorted(found[:4])
    assert found[4] == found[7] < found[5] < found[6]
    # Float64; pytest allows 1e-12 beside 0.
    assert sum(found[:4]) == pytest.approx(0) == pytest.approx(sum(found[4:]))


def test_wrong_rewards_and_prompts_are_refused(trl, tmp_path):
    few = reward_function(x=lambda **columns: [1.0] * 3)
    with pytest.raises(ValueError, match=r"'x' should return one number.*4 completions\. Found 3"):
        call(few, tmp_path, ["a"] * 4)
    infinite = reward_function(x=lambda **columns: [math.inf] * 4)
    with pytest.raises(ValueError, match="Found an infinity"):
        call(infinite, tmp_path, ["a"] * 4)
    with pytest.raises(ValueError, match="Prompts should hold text alone"):
        call(reward_function(), tmp_path, [[{"content": object()}]] * 4)


def main(folder: Path) -> None:
    signal.alarm(int(HANG))  # a collective that waits for ever ends here
    reward = reward_function()
    # Two completions of each group on either process.
    small = {"per_device_train_batch_size": 2, "max_steps": 2, "eval_strategy": "no"}
    grpo_trainer(folder, reward, **small, save_strategy="no").train()
    (folder / f"{os.environ['RANK']}.json").write_text(reward.aggregation.state())
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_groups_may_lie_on_two_processes(trl, tmp_path):
    two_processes(__file__, tmp_path)
    check_advantages(tmp_path, steps=2)
    first, second = ((tmp_path / f"{rank}.json").read_text() for rank in range(2))
    assert first == second
    assert json.loads(first)["completed"] == 2


if __name__ == "__main__":
    main(Path(sys.argv[1]))
