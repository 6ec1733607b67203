"""One optimizer step: the loss scale, and gradients that are not finite."""

from __future__ import annotations

import math

import pytest
import torch

from moa_diffusion.storage import checkpoint
from moa_diffusion.training.loop import Run
from moa_diffusion.training.stepper import TrainingError
from toy_runs import (
    at_rollout,
    broken_log_probs,
    drift,
    make,
    rows,
    same,
    state,
)


def scaled(trainer: Run, scale: float) -> None:
    trainer.learner.stepper.scaler = torch.amp.GradScaler(
        "cpu", init_scale=scale, growth_interval=2
    )


def overflow_above(trainer: Run, limit: float) -> None:
    """Gradients are infinite at a larger loss scale, as float16 has it."""
    trainer.policy.drift.register_hook(
        lambda gradient: (
            gradient * (math.inf if trainer.learner.stepper.loss_scale > limit else 1.0)
        )
    )


def test_a_loss_scale_that_falls_from_its_start_is_no_failure(tmp_path, caplog):
    trainer = make(tmp_path / "run", loss__max_skipped=1, trainer__steps=6)
    scaled(trainer, 2.0**24)
    overflow_above(trainer, 2.0**20)
    trainer.run()
    found = rows(tmp_path / "run")
    # Four fall, and every second update from then on tries twice the scale, which fails.
    assert [row["policy/skipped_updates"] for row in found] == [2, 2, 0, 1, 1, 0]
    scales = [math.log2(row["policy/loss_scale"]) for row in found]
    assert scales == [22, 20, 21, 20, 20, 21]
    assert "Update skipped" not in caplog.text
    assert drift(trainer).any()
    assert trainer.learner.stepper.skipped_in_a_row == 0


def test_at_the_usual_scale_a_skip_is_a_skip(tmp_path):
    trainer = make(tmp_path / "run", loss__max_skipped=3, trainer__steps=20)
    scaled(trainer, 2.0**18)
    overflow_above(trainer, 0.0)
    with pytest.raises(TrainingError, match="non-finite gradients"):
        trainer.run()
    assert trainer.completed == 3  # two updates may fall, three and the rollout's rest are counted


def test_the_loss_scale_is_resumed(tmp_path):
    ends = []
    for name, parts in (("straight", [6]), ("resumed", [3, 6])):
        for number, steps in enumerate(parts):
            trainer = make(
                tmp_path / name, trainer__steps=steps, resume="latest" if number else None
            )
            scaled(trainer, 2.0**24)
            if number:  # as it was built, the scaler had not been there
                trainer.load_state_dict(
                    checkpoint.load_state(checkpoint.find("latest", tmp_path / name))
                )
            overflow_above(trainer, 2.0**20)
            trainer.run()
        ends.append((state(trainer), rows(tmp_path / name)))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_float16_starts_with_a_scale_for_its_latents(tmp_path):
    from moa_diffusion.training.stepper import first_scale

    assert first_scale(16 * 64 * 64) == 2**28  # where a random model's error is below 0.01
    assert first_scale(1) == 2**16  # a text's tokens
    trainer = make(tmp_path / "run", policy__dtype="float16", optimizer__eps=1e-12)
    state = trainer.learner.stepper.scaler.state_dict()
    assert state["scale"] == first_scale(3)
    assert state["growth_interval"] == 50
    assert trainer.learner.stepper.optimizer.param_groups[0]["eps"] == 1e-12
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


def test_the_size_of_a_gradients_elements(tmp_path):
    found = make(tmp_path / "run").step()
    # A float32 norm and Python's division: within 1e-7.
    assert found["policy/grad_rms"] == pytest.approx(found["policy/grad_norm"] / math.sqrt(6))


def test_non_finite_gradients_skip_the_update_and_are_counted(tmp_path):
    trainer = make(tmp_path / "run")
    before = {}

    def spoil(values: torch.Tensor) -> torch.Tensor:
        if trainer.completed != 1 or not torch.is_grad_enabled():
            return values
        before.setdefault("drift", drift(trainer))
        before.setdefault("count", trainer.learner.stepper.ema.count)
        return values * math.nan

    broken_log_probs(trainer, spoil)
    at_rollout(trainer, 2, lambda: before.setdefault("after", drift(trainer)))
    trainer.run()
    found = rows(tmp_path / "run")
    assert [row["policy/skipped_updates"] for row in found] == [0, 2, 0, 0]
    assert found[1]["policy/grad_norm"] is None
    assert torch.equal(before["after"], before["drift"])
    assert trainer.learner.stepper.ema.count == before["count"] + 4
    assert drift(trainer).isfinite().all()


def test_many_skipped_updates_in_a_row_stop_the_run(tmp_path):
    trainer = make(tmp_path / "run", loss__max_skipped=3)
    broken_log_probs(trainer, lambda x: x * math.nan if torch.is_grad_enabled() else x)
    with pytest.raises(TrainingError, match="last 4 updates had non-finite gradients") as caught:
        trainer.run()
    assert trainer.completed == 2
    assert "step-000002" in caught.value.__notes__[0]
    assert not drift(trainer).any()
