"""The on-policy check, and the gap that it leaves."""

from __future__ import annotations

import math

import pytest
import torch

from moa_diffusion.policies.base import Terms
from moa_diffusion.training.stepper import TrainingError
from toy_runs import (
    broken_log_probs,
    drift,
    make,
    rows,
)


@pytest.mark.parametrize("change", [lambda x: x + 1e-3, lambda x: x * math.nan])
def test_log_probs_that_differ_from_sampling_stop_the_run_at_once(tmp_path, change):
    trainer = make(tmp_path / "run", loss__ratio_tolerance=1e-4)
    broken_log_probs(trainer, change)
    with pytest.raises(TrainingError, match="not on-policy") as caught:
        trainer.run()
    message = str(caught.value)
    for part in ("1.00e-03" if "nan" not in message else "inf", "loss.ratio_tolerance", "Likely"):
        assert part in message
    assert trainer.completed == 0
    assert not drift(trainer).any()


def test_the_on_policy_check_looks_at_every_decision(tmp_path):
    trainer = make(tmp_path / "run", sampling__steps=3, loss__ratio_tolerance=1e-4)
    log_probs = trainer.policy.log_probs
    trainer.policy.log_probs = lambda rollout, steps, with_kl=False: Terms(
        log_probs(rollout, steps).log_probs + (5e-3 if steps.start == 2 else 0.0)
    )
    with pytest.raises(TrainingError, match=r"By decision.*'0.0e\+00', '0.0e\+00', '5.0e-03'"):
        trainer.run()


def test_a_decision_is_checked_when_a_rollout_first_has_it(tmp_path):
    """A window that moves to a step which is not on-policy stops the run there, not before."""
    trainer = make(tmp_path / "run", sampling__steps=3, loss__ratio_tolerance=1e-4)
    log_probs, asked = trainer.policy.log_probs, []

    def wrapped(rollout, steps, with_kl=False):
        number = windows[trainer.completed][steps.start]
        if not torch.is_grad_enabled():
            asked.append((trainer.completed, number))
        return Terms(log_probs(rollout, steps).log_probs + (5e-3 if number == 7 else 0.0))

    windows = {0: (0, 1, 2), 1: (1, 2, 3), 2: (0, 1, 2), 3: (2, 3, 7)}
    trainer.policy.log_probs = wrapped
    trainer.policy.trained_steps = windows.__getitem__
    with pytest.raises(TrainingError, match=r"By decision.*'0.0e\+00', '0.0e\+00', '5.0e-03'"):
        trainer.run()
    assert trainer.completed == 3
    assert asked == [(0, 0), (0, 1), (0, 2), (1, 3), (3, 7)]


def test_the_gap_before_any_update_is_logged_and_said_once(tmp_path, caplog):
    trainer = make(tmp_path / "run", loss__ratio_tolerance=1e-4)
    log_probs = trainer.policy.log_probs
    trainer.policy.log_probs = lambda rollout, steps, with_kl=False: Terms(
        log_probs(rollout, steps).log_probs + (2e-3 if torch.is_grad_enabled() else 0.0)
    )
    trainer.run()
    for row in rows(tmp_path / "run"):
        # A log-prob of about 1 plus 0.002, rounded by 1e-7: 6e-5 of the gap.
        assert row["policy/ratio_gap"] == pytest.approx(2e-3, rel=1e-3)
    assert caplog.text.count("before any update") == 1
    exact = make(tmp_path / "exact")
    exact.run()
    # Log-probs of about 1, of the same kernels in batches of another size: 16 roundings of float32.
    assert all(row["policy/ratio_gap"] < 1e-6 for row in rows(tmp_path / "exact"))


def test_half_the_clip_range_is_the_tolerance_by_default(tmp_path):
    assert make(tmp_path / "a", loss__clip_range=1e-3).learner.steps.settings.tolerance == 5e-4
    told = make(tmp_path / "b", loss__clip_range=1e-3, loss__ratio_tolerance=1e-5)
    assert told.learner.steps.settings.tolerance == 1e-5
