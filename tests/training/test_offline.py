"""MOPO from preferences on a table of logits: the optimum, resumed, and failing well."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moa_diffusion.config.schema import CheckpointConfig, TrainerConfig
from moa_diffusion.data.preferences import Preferences
from moa_diffusion.distributed import LocalComm
from moa_diffusion.monitoring.alarm import Watch
from moa_diffusion.monitoring.console import Console
from moa_diffusion.monitoring.heldout import Evaluation
from moa_diffusion.monitoring.progress import Progress
from moa_diffusion.objectives.mopo_offline import OfflineSettings
from moa_diffusion.processes.stopping import Interrupted
from moa_diffusion.scoring import RewardError
from moa_diffusion.storage import checkpoint
from moa_diffusion.storage.log import RunLog, read_metrics
from moa_diffusion.training.ema import EMA
from moa_diffusion.training.loop import Run
from moa_diffusion.training.offline import Cloning, OfflineTrainer, constrained
from moa_diffusion.training.stepper import Stepper, TrainingError
from moa_diffusion.types import ConfigError, Request
from waiting import HANG

NAN, INFINITY = math.nan, math.inf
# What steps in float32 leave. Sums that rows, micro-batches or processes cut otherwise differ by
# 1e-7 of a gradient. Adam divides by its size, and ten steps of lr = 0.1 leave 1e-7 of it.
STEPS = 1e-5
# Fast enough for a test, and a reference that stays, so that the optimum is the solver's.
QUICK = OfflineSettings(tau=0.2, eta=0.5, lag=0)


class Table:
    """A logit for each response of each prompt; a response is one token."""

    copies: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, data: Preferences, base: Tensor | None = None) -> None:
        self.places = {
            (prompt, text): (p, y)
            for p, (prompt, texts) in enumerate(zip(data.prompts, data.responses, strict=True))
            for y, text in enumerate(texts)
        }
        shape = data.log_data.shape
        self.base = torch.zeros(shape) if base is None else base.float()
        self.hidden = data.log_data == -INFINITY
        self.delta = nn.Parameter(torch.zeros(shape))
        self.asked = 0  # rows that it was asked about

    def prepare(self, prompts: Sequence[str]) -> None:
        assert set(prompts) <= {prompt for prompt, _ in self.places}

    def table(self) -> Tensor:
        """Log-probabilities ``[P, Y]``."""
        return (self.base + self.delta).masked_fill(self.hidden, -INFINITY).log_softmax(1)

    def tokens_of(self, texts: Sequence[str]) -> list[list[int]]:
        if "too long" in texts:
            raise ValueError("Parameter `texts` should fit. Found 'too long'.")
        return [[int(text.removeprefix("answer "))] for text in texts]

    def log_probs_of(self, prompts: Sequence[str], tokens: Sequence[Sequence[int]]) -> Tensor:
        self.asked += len(tokens)
        pairs = zip(prompts, tokens, strict=True)
        places = torch.tensor([self.places[p, f"answer {answer}"] for p, (answer,) in pairs])
        return self.table()[places[:, 0], places[:, 1]]

    def trainable(self) -> Mapping[str, nn.Parameter]:
        return {"delta": self.delta}

    @contextmanager
    def reference(self) -> Iterator[None]:
        kept = self.delta.detach().clone()
        with torch.no_grad():
            self.delta.zero_()
        try:
            yield
        finally:
            with torch.no_grad():
                self.delta.copy_(kept)

    def save(self, folder: Path) -> None:
        (folder / "delta.json").write_text(json.dumps(self.delta.tolist()))


def preferences(
    win_rates: Tensor, *, counts: Sequence[int] | None = None, log_probs: Tensor | None = None
) -> Preferences:
    """Data with these win rates ``[K, P, Y]``; ``counts`` are the responses of each prompt."""
    k, p, y = win_rates.shape
    counts = counts or [y] * p
    log_data = torch.full((p, y), -INFINITY, dtype=torch.float64)
    for row, count in zip(log_data, counts, strict=True):
        row[:count] = -math.log(count)
    return Preferences(
        objectives=("taste", "price", "health")[:k],
        prompts=tuple(f"prompt {i}" for i in range(p)),
        responses=tuple(tuple(f"answer {j}" for j in range(count)) for count in counts),
        metadata=({},) * p,
        win_rates=torch.where(log_data > -INFINITY, win_rates, NAN),
        log_data=log_data,
        log_probs=log_probs,
    )


def opposed(seed: int, *, k: int = 2, p: int = 3, y: int = 4) -> Tensor:
    """Win rates ``[K, P, Y]`` of which the others oppose the first."""
    noise = torch.rand(k, p, y, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise[1:] = 0.5 * (1 - noise[0]) + 0.5 * noise[1:]
    return noise


def make(
    folder: Path,
    data: Preferences,
    *,
    bounds: dict[str, float] | float = 0.5,
    settings: OfflineSettings = QUICK,
    steps: int = 150,
    batch: int | None = None,
    micro: int = 64,
    lr: float = 0.1,
    comm: Any = None,
    base: Tensor | None = None,
    primary: str = "taste",
    seed: int = 0,
    level_prompts: int = 512,
    start: Tensor | None = None,
    minutes: float = 0.0,
    checkpoint_every: int = 0,
    checkpoint_keep: int = 0,
    evaluate_every: int = 0,
) -> Run:
    policy = Table(data, base)
    if start is not None:  # start as a trained adapter does
        policy.delta.data.copy_(start)
    parameters = list(policy.trainable().values())
    comm = comm or LocalComm()
    cloning = Cloning(
        policy=policy,  # type: ignore[arg-type]  # what needs no images
        stepper=Stepper(
            policy=policy,  # type: ignore[arg-type]
            optimizer=torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0),
            lr=lambda count: lr * max(0.02, 1 - count / steps),
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            ema=EMA(policy.trainable(), decay=0.5, every=1),
            max_grad_norm=1.0,
            max_skipped=3,
        ),
        data=data,
        comm=comm,
        micro_batch=micro,
    )
    learner = OfflineTrainer(
        cloning=cloning,
        mopo=constrained(data, primary, bounds, settings),
        progress=Progress(comm, bars=False),
        seed=seed,
        batch=len(data.rows()) if batch is None else batch,
        level_prompts=level_prompts,
        from_adapter=start is not None,
    )
    return Run(
        learner,
        length=TrainerConfig(steps=steps, minutes=minutes),
        checkpoints=CheckpointConfig(every=checkpoint_every, keep=checkpoint_keep, front=0),
        evaluate_every=evaluate_every,
        heldout=None,
        watch=Watch(data.objectives, ()),
        log=RunLog(folder, main=comm.rank == 0),
        console=Console(shown=False, title=learner.title, total=steps),
        folder=folder,
        seed=seed,
    )


def learned(trainer: Run) -> Tensor:
    """The policy's probabilities ``[P, Y]``."""
    return trainer.policy.table().detach().exp().double()  # type: ignore[attr-defined]


def train(trainer: Run) -> dict[str, float]:
    """All steps, without files; returns the last one's metrics and an evaluation."""
    told: dict[str, float] = {}
    while trainer.completed < trainer.length.steps:
        told = trainer.step()
    return told | trainer.evaluate()


def rows(folder: Path) -> list[dict[str, Any]]:
    """Metrics without what a clock measured."""
    return [
        {name: value for name, value in row.items() if not name.startswith("seconds/")}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def same(left: object, right: object) -> bool:
    """Equal to the last bit, through nested containers."""
    if isinstance(left, Tensor):
        return torch.allclose(left, right, rtol=0, atol=0, equal_nan=True)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def state(trainer: Run) -> dict[str, Any]:
    return {key: value for key, value in trainer.state_dict().items() if key != "seconds"}


# ---------------------------------------------------------------------- the optimum


def by_solver(rates: Tensor, log_ref: Tensor, tau: float, bounds: Sequence[float]) -> Tensor:
    """``max_pi E p - tau KL(pi || ref)`` subject to ``E q >= b``, by SLSQP: ``[P, Y]``."""
    optimize = pytest.importorskip("scipy.optimize")
    p, q, ref = rates[0].numpy(), rates[1:].numpy(), log_ref.numpy()
    sums = np.kron(np.eye(len(p)), np.ones(p.shape[1]))  # [P, P Y]
    levels = q.reshape(len(q), -1) / len(p)  # [K, P Y]

    def loss(x):
        pi = x.reshape(p.shape)
        return -(pi * p - tau * pi * (np.log(pi) - ref)).sum() / len(p)

    def slope(x):
        return -(p - tau * (np.log(x.reshape(p.shape)) - ref + 1)).flatten() / len(p)

    found = optimize.minimize(
        loss,
        np.exp(ref).flatten(),
        jac=slope,
        method="SLSQP",
        bounds=[(1e-12, 1)] * p.size,
        constraints=[
            {"type": "eq", "fun": lambda x: sums @ x - 1, "jac": lambda x: sums},
            {"type": "ineq", "fun": lambda x: levels @ x - bounds, "jac": lambda x: levels},
        ],
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    assert found.success, found.message
    return torch.from_numpy(found.x.reshape(p.shape))


@pytest.mark.parametrize("case", ["one bound", "two bounds", "behaviour", "micro-batches"])
def test_the_trained_policy_is_the_constrained_optimum(tmp_path, case):
    k = 3 if case == "two bounds" else 2
    rates, base = opposed(1, k=k), None
    log_ref = torch.full((3, 4), -math.log(4), dtype=torch.float64)
    data = preferences(rates)
    if case == "behaviour":  # the responses are another policy's, the reference is the model's
        base = torch.randn(3, 4, generator=torch.Generator().manual_seed(3)).double()
        data = preferences(rates, log_probs=log_ref)
        log_ref = base.log_softmax(1)
    free = ((rates[0] / 0.2 + log_ref).softmax(1) * rates).sum(2).mean(1)
    least = [float(level) + 0.06 for level in free[1:]]  # so that every bound binds
    bounds = dict(zip(data.objectives[1:], least, strict=True))
    small = {"batch": 6, "micro": 2} if case == "micro-batches" else {}
    trainer = make(tmp_path, data, bounds=bounds, base=base, **{"steps": 250, **small})
    last = train(trainer)
    expected = by_solver(rates, log_ref, 0.2, least)
    # What 150 or 250 steps of Adam leave: 0.009 of a probability and 0.0012 of a level.
    assert (learned(trainer) - expected).abs().max() < 0.02
    levels = (learned(trainer) * rates).sum(2).mean(1)
    assert (levels[1:] - torch.tensor(least)).abs().max() < 0.01
    assert levels[0] < free[0] - 0.005  # 0.03
    assert last["mopo_level/price"] == pytest.approx(least[0], abs=0.005)
    assert last["mopo_violation/price"] == pytest.approx(0, abs=0.005)
    assert last["mopo_lambda/price"] > 0.1  # 1.2
    assert last["eval_level/price"] == pytest.approx(least[0], abs=0.01)


def test_one_objective_is_tilted_towards_without_bounds(tmp_path):
    rates = opposed(2, k=1)
    trainer = make(tmp_path, preferences(rates))
    train(trainer)
    assert (learned(trainer) - (rates[0] / 0.2).softmax(1)).abs().max() < 0.02  # 0.001
    assert trainer.learner.mopo.headline() == ""


def test_prompts_count_the_same_however_many_responses_they_have(tmp_path):
    """The mean over all rows is the cross-entropy to the target, averaged over prompts."""
    data = preferences(opposed(4, p=2, y=5), counts=[5, 2])
    trainer = make(tmp_path, data, bounds=0.0, steps=3, batch=7)
    told = trainer.step()
    target = (data.win_rates[0].nan_to_num(0) / 0.2 + data.log_data).softmax(1)
    expected = -(target * torch.where(target > 0, data.log_data, 0)).sum(1).mean()
    # A mean of seven log-probs in float32: 2e-8 apart.
    assert told["offline/loss"] == pytest.approx(float(expected), rel=1e-5)
    plain = -(5 * math.log(5) + 2 * math.log(2)) / 7
    assert told["offline/log_prob"] == pytest.approx(plain, rel=1e-5)
    assert told["offline/tokens"] == 1
    sizes = 1 / target.square().sum(1)
    # Made of float64 targets.
    assert told["offline/effective_sample_size"] == pytest.approx(float(sizes.mean()))


def test_every_epoch_shows_every_row_once(tmp_path):
    trainer = make(tmp_path, preferences(opposed(0)), batch=5)
    seen = []
    for trainer.progress.completed in range(12):
        seen += trainer.learner.rows()
    epochs = [sorted(seen[start : start + 12]) for start in range(0, 60, 12)]
    assert epochs == [list(range(12))] * 5
    assert seen[:12] != seen[12:24] != sorted(seen[12:24])


@pytest.mark.parametrize("log_probs", [False, True])
def test_a_bound_out_of_reach_is_refused_at_the_start(tmp_path, log_probs):
    mu = torch.full((3, 4), -1.0).double() if log_probs else None
    data = preferences(opposed(1), log_probs=mu)
    most = float(opposed(1)[1].amax(1).mean())  # what a policy that knows the price alone reaches
    with pytest.raises(ValueError, match=r"Found 0\.99 for `price`") as caught:
        make(tmp_path, data, bounds=0.99, settings=replace(QUICK, maximum=20.0))
    (said,) = re.findall(r"reach is (0\.\d+)\.", str(caught.value))
    # A tilt at a finite multiplier falls short by 0.003; three digits are said.
    assert float(said) == pytest.approx(most, abs=0.005)
    if log_probs:  # what this reference cannot keep is known once the model has been asked
        base = 20.0 * (opposed(1)[1] == opposed(1)[1].amin(1, keepdim=True))
        trainer = make(tmp_path, data, bounds=most - 0.01, base=base, settings=QUICK)
        with pytest.raises(ConfigError, match=r"^objectives\.weighting: Parameter `bounds`"):
            trainer.run()
        assert trainer.completed == 0


def test_bounds_that_exclude_each_other_are_warned_of_once(tmp_path, caplog):
    """Within the smaller multipliers of a test: what is possible, but not with these."""
    rates = opposed(1, k=3)
    settings = replace(QUICK, maximum=0.3)
    free = ((rates[0] / 0.2).softmax(1) * rates).sum(2).mean(1)
    trainer = make(tmp_path, preferences(rates), bounds=0.0, settings=settings, steps=60)
    with torch.no_grad():
        trainer.learner.mopo.floor[0] = float(free[1]) + 0.2
    with caplog.at_level(logging.WARNING):
        trainer.run()
    (record,) = caplog.records
    assert "on `price` may be out of reach" in record.getMessage()
    assert trainer.learner.mopo.lambdas[0] == 0.3


# ---------------------------------------------------------------------- the reference


def test_the_reference_is_the_policy_of_a_lag_ago(tmp_path):
    data = preferences(opposed(1))
    trainer = make(tmp_path, data, settings=replace(QUICK, lag=4), steps=20)
    before = []
    for _ in range(13):
        before.append(learned(trainer))
        trainer.step()
    # The last was taken at step 12: the policy at step 8.
    # It is asked for in float32: 4e-8 apart.
    torch.testing.assert_close(trainer.learner.mopo.log_ref.exp(), before[8], rtol=0, atol=1e-6)
    assert (before[8] - before[4]).abs().max() > 1e-3


@pytest.mark.parametrize("follow", ["ratchet", "beta_lag"])
@pytest.mark.parametrize("variant", ["lagrangian", "barrier"])
def test_a_step_puts_new_state_in_the_place_of_the_old(tmp_path, variant, follow):
    """So that going back to the state before a step needs no copy of it."""
    settings = replace(QUICK, lag=2, variant=variant, follow=follow)
    trainer = make(tmp_path, preferences(opposed(1)), bounds=0.3, settings=settings, steps=20)
    seen = []
    for _ in range(7):
        state = trainer.learner.mopo.state_dict()
        seen.append((state, {name: value.clone() for name, value in state.items()}))
        trainer.step()
    for state, copied in seen:
        for name, value in state.items():
            torch.testing.assert_close(value, copied[name], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(seen[0][0]["log_ref"], seen[-1][0]["log_ref"])


def test_a_lagged_reference_drives_on_under_the_bound(tmp_path):
    """Tilts multiply, so the policy goes further from its start; the bound still holds."""
    rates = opposed(1)
    bounds = {"price": 0.62}
    told = []
    for lag in (0, 25):
        settings = replace(QUICK, lag=lag, beta=0.0)
        trainer = make(tmp_path, preferences(rates), bounds=bounds, settings=settings)
        told.append(train(trainer))
    assert told[1]["eval_level/taste"] > told[0]["eval_level/taste"] + 0.02  # 0.031
    for found in told:  # 0.004 is what the steps leave
        assert found["eval_level/price"] == pytest.approx(0.62, abs=0.01)


def test_the_published_rule_lets_a_bound_sink_and_the_ratchet_does_not(tmp_path):
    told = {}
    for follow in ("ratchet", "beta_lag"):
        settings = replace(QUICK, lag=25, beta=0.95, follow=follow)
        data = preferences(opposed(1))
        told[follow] = train(make(tmp_path, data, bounds={"price": 0.62}, settings=settings))
    assert told["ratchet"]["mopo_bound/price"] == 0.62
    assert told["ratchet"]["eval_level/price"] == pytest.approx(0.62, abs=0.01)  # 0.004, as above
    assert told["beta_lag"]["mopo_bound/price"] < 0.56  # 0.545
    assert told["beta_lag"]["eval_level/price"] < 0.58  # 0.570


@pytest.mark.parametrize("lag", [0, 3])
def test_a_start_from_an_adapter_is_the_first_reference_and_wrote_the_responses(tmp_path, lag):
    """As a base model that is what base model and adapter are together."""
    data = preferences(opposed(1))
    base, start = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(5))
    found = []
    for number, given in enumerate(({"base": base, "start": start}, {"base": base + start})):
        trainer = make(
            tmp_path / str(number),
            data,
            settings=replace(QUICK, lag=lag),
            steps=9,
            batch=5,
            evaluate_every=3,
            **given,
        )
        trainer.run()
        rows = read_metrics(tmp_path / str(number) / "metrics.jsonl")
        found.append(
            [{k: v for k, v in row.items() if not k.startswith("seconds/")} for row in rows]
        )
    first = {
        f"eval_level/{name}": float(r.mean())
        for name, r in zip(data.objectives, data.win_rates, strict=True)
    }
    # Before any step the ratio is 1 but for the rounding of log-probs.
    assert {name: found[0][0][name] for name in first} == pytest.approx(first, abs=1e-6)
    for mine, other in zip(*found, strict=True):
        # Sums of float32 logits, in another order.
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_with_log_probs_too_an_adapter_is_the_first_reference(tmp_path):
    mu = opposed(4, p=6).sum(0).log_softmax(-1)[:3]
    data = preferences(opposed(1), log_probs=mu)
    base, start = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(5))
    trainer = make(tmp_path, data, bounds=0.0, base=base, start=start)
    trainer.learner.refer()
    expected = (data.log_data + (base + start).log_softmax(1) - mu).log_softmax(1)
    # Log-probs of a few nats in float32: some 16 roundings.
    torch.testing.assert_close(trainer.learner.mopo.log_ref, expected.double(), rtol=0, atol=4e-6)


# ---------------------------------------------------------------------- what is read


@pytest.mark.parametrize("lag", [0, 5])
def test_no_more_log_probs_are_computed_than_needed(tmp_path, lag):
    """200 prompts of two responses, two of which are trained on in a step."""
    data = preferences(torch.rand(2, 200, 2, generator=torch.Generator().manual_seed(0)).double())
    trainer = make(
        tmp_path,
        data,
        bounds=0.0,
        settings=replace(QUICK, lag=lag),
        steps=20,
        batch=2,
        evaluate_every=10,
        level_prompts=7,
    )
    trainer.run()
    policy = trainer.policy
    evaluations = 3 * 14 + 14  # the average's, and once the base model's
    assert isinstance(policy, Table)
    # At steps 5, 10, 15 ten rows' prompts are asked about, of which some meet twice, with the
    # siblings and once more of the base model; trained on are 40 rows.
    references = 3 * 10 * 2 * 2 if lag else 0
    assert evaluations + references / 2 <= policy.asked - 40
    assert policy.asked - 40 <= evaluations + references
    assert {type(ids) for ids in trainer.learner.cloning._tokens} == {array}  # on no device
    known = ~trainer.learner.mopo.log_ref.isnan().any(1)
    assert int(known.sum()) == (
        200 if lag == 0 else len({r // 2 for r in trainer.learner.rows(range(15, 20))})
    )


def test_a_reference_of_some_prompts_is_that_of_all(tmp_path):
    """Trained on are the same rows with the same weights as with the log-probs of everything."""
    data = preferences(opposed(1, p=40))
    trainers = []
    for everything in (False, True):
        trainer = make(
            tmp_path, data, bounds=0.0, settings=replace(QUICK, lag=3, beta=0.0), steps=12, batch=2
        )
        if everything:
            trainer.learner._prompts_of = lambda steps: torch.arange(40)  # type: ignore[method-assign]
        for _ in range(12):
            trainer.step()
        trainers.append(trainer)
    few, all_ = trainers
    assert few.policy.asked < all_.policy.asked
    # A policy in float32; a softmax over fewer rows may round another way.
    torch.testing.assert_close(learned(few), learned(all_), rtol=0, atol=STEPS)
    known = ~few.learner.mopo.log_ref.isnan().any(1)
    assert 0 < known.sum() <= 6  # rows of three steps
    torch.testing.assert_close(
        few.learner.mopo.log_ref[known], all_.learner.mopo.log_ref[known], rtol=0, atol=STEPS
    )


def test_rows_that_the_reference_was_not_asked_for_stop_the_run(tmp_path):
    data, options = (
        preferences(opposed(1, p=40)),
        {"bounds": 0.0, "settings": replace(QUICK, lag=3)},
    )
    first = make(tmp_path, data, batch=4, **options)
    for _ in range(7):
        first.step()
    other = make(tmp_path, data, batch=9, **options)
    other.load_state_dict(first.state_dict())
    with pytest.raises(TrainingError, match=r"`preferences\.batch` .* should be those of the run"):
        other.step()


# ---------------------------------------------------------------------- processes


class ThreadComm:
    """One of several processes, as a thread."""

    def __init__(self, rank: int, shared: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size = rank, len(shared)
        self._shared, self._barrier = shared, barrier

    def _exchange(self, mine: Any) -> list[Any]:
        self._shared[self.rank] = mine
        self._barrier.wait(HANG)
        everyone = list(self._shared)
        self._barrier.wait(HANG)
        return everyone

    def gather(self, local: Tensor) -> Tensor:
        return torch.cat(self._exchange(local))

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        everyone = self._exchange([tensor.clone() for tensor in tensors])
        for tensor, parts in zip(tensors, zip(*everyone, strict=True), strict=True):
            tensor.copy_(torch.stack(parts).sum(0))

    def any(self, flag: bool) -> bool:
        return any(self._exchange(flag))

    def barrier(self) -> None:
        self._exchange(None)


def at_once(act: Callable[[ThreadComm], Any], count: int) -> list[Any]:
    """What each of ``count`` processes answers; an error of one is raised here."""
    shared, barrier, found = [None] * count, threading.Barrier(count), [None] * count

    def one(rank: int) -> None:
        try:
            found[rank] = act(ThreadComm(rank, shared, barrier))
        except BaseException as error:
            found[rank] = error
            barrier.abort()  # nobody waits for this one

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_rows_and_end_in_the_same_parameters(tmp_path, count):
    """Also where some have nothing to do: seven rows in micro-batches of four."""
    data = preferences(opposed(3))

    def steps(comm: Any) -> dict[str, Any]:
        trainer = make(
            tmp_path / str(count),
            data,
            settings=replace(QUICK, lag=3),
            batch=7,
            micro=4,
            comm=comm,
        )
        told = [trainer.step() for _ in range(10)]
        return {"state": state(trainer), "told": told}

    alone = steps(LocalComm())
    for other in at_once(steps, count):
        assert not isinstance(other, BaseException), other
        for part in ("trainable", "ema"):
            mine, yours = (found["state"]["updater"][part] for found in (alone, other))
            mine, yours = ((v["average"] if part == "ema" else v)["delta"] for v in (mine, yours))
            assert mine.abs().max() > 0.1
            torch.testing.assert_close(yours, mine, rtol=0, atol=STEPS)
        for name in ("log_ref", "lambdas"):
            torch.testing.assert_close(
                other["state"]["mopo"][name], alone["state"]["mopo"][name], rtol=0, atol=STEPS
            )
        for mine, yours in zip(alone["told"], other["told"], strict=True):
            clean = [{n: v for n, v in x.items() if v == v} for x in (mine, yours)]
            # What is logged is up to some ten times larger.
            assert clean[1] == pytest.approx(clean[0], abs=10 * STEPS)


def test_a_process_without_rows_keeps_up_with_a_loss_scale(tmp_path):
    """As float16 has it: four rows in one micro-batch for three processes."""

    def steps(comm: Any, scale: float | None = 1024.0) -> Tensor:
        trainer = make(tmp_path, preferences(opposed(3)), batch=4, micro=4, comm=comm)
        if scale is not None:
            trainer.learner.cloning.stepper.scaler = torch.amp.GradScaler(
                "cpu", init_scale=scale, enabled=True
            )
        told = [trainer.step() for _ in range(3)]
        assert [row["policy/skipped_updates"] for row in told] == [0, 0, 0]
        return learned(trainer)

    expected = steps(LocalComm(), scale=None)
    for found in at_once(steps, 3):
        assert isinstance(found, Tensor), found
        torch.testing.assert_close(found, expected, rtol=0, atol=STEPS)


def test_micro_batches_change_nothing(tmp_path):
    data = preferences(opposed(3))
    found = []
    for micro in (1, 5, 12):
        trainer = make(tmp_path, data, batch=12, micro=micro)
        for _ in range(5):
            trainer.step()
        found.append(learned(trainer))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=STEPS)


# ---------------------------------------------------------------------- resumed


@pytest.mark.parametrize("stop", [3, 4, 9])  # before, at and after a new reference
@pytest.mark.parametrize("log_probs", [False, True])
def test_a_resumed_run_is_the_run_that_went_through(tmp_path, stop, log_probs):
    mu = opposed(8)[0].log_softmax(1) if log_probs else None
    data = preferences(opposed(5, k=3), log_probs=mu)
    options: dict[str, Any] = {
        "settings": replace(QUICK, lag=4),
        "steps": 12,
        "batch": 5,
        "micro": 2,
        "evaluate_every": 3,
    }
    straight = make(tmp_path / "straight", data, **options)
    straight.run()
    first = make(tmp_path / "run", data, checkpoint_every=stop, **options)
    first.run()
    resumed = make(tmp_path / "run", data, **options)
    folder = checkpoint.step_folder(tmp_path / "run", stop)
    resumed.load_state_dict(checkpoint.load_state(folder))
    assert resumed.completed == stop
    assert checkpoint.list_checkpoints(tmp_path / "run")[-1] == folder  # later ones are forgotten
    resumed.run()
    assert same(state(resumed), state(straight))
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(13))
    assert [row["step"] for row in rows(tmp_path / "run") if "eval_level/price" in row] == [
        0,
        3,
        6,
        9,
        12,
    ]


def test_a_checkpoint_holds_the_adapter_and_its_average(tmp_path):
    trainer = make(
        tmp_path, preferences(opposed(1)), steps=6, checkpoint_every=2, checkpoint_keep=2
    )
    trainer.run()
    folders = checkpoint.list_checkpoints(tmp_path)
    assert [folder.name for folder in folders] == ["step-000004", "step-000006"]
    live, average = (
        torch.tensor(json.loads((folders[-1] / name).read_text()))
        for name in ("delta.json", "ema/delta.json")
    )
    # JSON has all the digits.
    torch.testing.assert_close(live, trainer.policy.trainable()["delta"].detach())
    torch.testing.assert_close(average, trainer.learner.cloning.stepper.ema.average["delta"])
    assert (live - average).abs().max() > 1e-3


def test_sigterm_saves_and_the_run_goes_on_later(tmp_path):
    data = preferences(opposed(1))
    straight = make(tmp_path / "straight", data, steps=6, batch=5)
    straight.run()
    stopped = make(tmp_path / "run", data, steps=6, batch=5)
    tokens_of, calls = stopped.policy.tokens_of, []

    def then_stop(texts):
        calls.append(len(texts))
        os.kill(os.getpid(), signal.SIGTERM)  # before the first step
        return tokens_of(texts)

    stopped.policy.tokens_of = then_stop
    with pytest.raises(Interrupted) as caught:
        stopped.run()
    assert calls == [12]
    assert "The state after 0 steps is in" in caught.value.__notes__[0]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    resumed = make(tmp_path / "run", data, steps=6, batch=5)
    resumed.load_state_dict(checkpoint.load_state(checkpoint.find("latest", tmp_path / "run")))
    resumed.run()
    assert same(state(resumed), state(straight))
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")


def test_an_evaluation_that_fails_is_made_up_for_after_a_resume(tmp_path):
    data = preferences(opposed(1))
    options: dict[str, Any] = {"steps": 6, "batch": 5, "evaluate_every": 2}
    broken = make(tmp_path / "run", data, **options)
    levels_of = broken.learner.mopo.levels_of

    def fail(log_ratio: Tensor) -> dict[str, float]:
        if broken.completed == 4:
            raise RewardError("judge: out of memory")
        return levels_of(log_ratio)

    broken.learner.mopo.levels_of = fail
    with pytest.raises(RewardError, match="judge"):
        broken.run()
    assert rows(tmp_path / "run")[-1]["step"] == 3
    resumed = make(tmp_path / "run", data, **options)
    resumed.load_state_dict(checkpoint.load_state(checkpoint.find("latest", tmp_path / "run")))
    assert resumed.completed == 4
    resumed.run()
    straight = make(tmp_path / "straight", data, **options)
    straight.run()
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")


def test_an_alarm_that_raises_the_kl_raises_tau(tmp_path):
    trainer = make(tmp_path, preferences(opposed(1)), bounds=0.0)
    trainer.watch.kl_scale = 2.5
    trainer.step()
    expected = float(((opposed(1)[0] / 0.5).softmax(1) * opposed(1)[0]).sum(1).mean())
    assert trainer.learner.mopo.reached == pytest.approx(expected)  # float64


def test_held_out_rewards_are_of_the_averaged_weights(tmp_path):
    trainer = make(tmp_path, preferences(opposed(1)), steps=4, evaluate_every=2)
    drawn: list[Tensor] = []

    class Fixed:
        """Stands for ``HeldOut``: looks at the policy."""

        requests = (Request(prompt="prompt 1"),)
        scorer = SimpleNamespace(seconds={}, load=lambda _: {"x": {"digest": "1"}}, close=list)

        def try_rewards(self) -> None:
            pass

        def __call__(self, step: int, *, before_batch: Callable[[], None]) -> Evaluation:
            drawn.append(learned(trainer))
            return Evaluation(
                step=step,
                names=trainer.watch.objectives,
                values=torch.ones(2, 1).double(),
                prompts=torch.zeros(1, dtype=torch.int64),
                statistics={},
                gaps={},
                metrics={"eval_mean/x": float(step)},
            )

        def state_dict(self) -> dict[str, Tensor]:
            return {}

    trainer.heldout = Fixed()  # type: ignore[assignment]
    trainer.run()
    assert [row.get("eval_mean/x") for row in rows(tmp_path)] == [0, None, 2, None, 4]
    average = (
        torch.log_softmax(trainer.learner.cloning.stepper.ema.average["delta"], 1).exp().double()
    )
    # A softmax in float32, written otherwise.
    torch.testing.assert_close(drawn[-1], average, rtol=0, atol=1e-6)
    assert (learned(trainer) - average).abs().max() > 1e-3
    assert (tmp_path / "rewards.json").is_file()
    trainer.close()


def test_minutes_end_the_run(tmp_path):
    trainer = make(tmp_path, preferences(opposed(1)), steps=100, minutes=1e-9)
    trainer.run()
    assert trainer.completed == 1
    assert checkpoint.list_checkpoints(tmp_path)


# ---------------------------------------------------------------------- failing well


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "resume: the checkpoint has seed 0. Found 1"),
        ({"primary": "price"}, r"objectives \['taste', 'price'\]. Found \['price', 'taste'\]"),
        ({"data": preferences(opposed(2))}, "resume: the checkpoint has preferences "),
    ],
)
def test_another_problem_is_not_resumed(tmp_path, change, message):
    data = preferences(opposed(1))
    saved = make(tmp_path, data, steps=3).state_dict()
    other = make(tmp_path, change.pop("data", data), steps=3, **change)
    with pytest.raises(ConfigError, match=message):
        other.load_state_dict(saved)


def test_a_response_that_does_not_fit_stops_the_run_before_the_first_step(tmp_path):
    data = preferences(opposed(1))
    texts = ("too long", *data.responses[2][1:])
    trainer = make(tmp_path, replace(data, responses=(*data.responses[:2], texts)), micro=2)
    with pytest.raises(TrainingError, match=r"A response cannot be learned: .* Found 'too long'"):
        trainer.run()
    assert trainer.completed == 0


def test_all_processes_know_of_a_response_that_does_not_fit(tmp_path):
    data = preferences(opposed(1))
    texts = (*data.responses[2][:3], "too long")
    data = replace(data, responses=(*data.responses[:2], texts))
    found = at_once(lambda comm: make(tmp_path, data, micro=6, comm=comm).step(), 2)
    assert all(isinstance(error, TrainingError) for error in found)
    assert all("Found 'too long'" in str(error) for error in found)


def test_gradients_that_are_not_finite_end_the_run_after_a_while(tmp_path, caplog):
    trainer = make(tmp_path, preferences(opposed(1)), steps=9)
    log_probs_of, before = trainer.policy.log_probs_of, learned(trainer)

    def broken(prompts, tokens):
        found = log_probs_of(prompts, tokens)
        return found * (NAN if found.requires_grad else 1.0)

    trainer.policy.log_probs_of = broken
    with pytest.raises(TrainingError, match="last 3 updates had non-finite gradients"):
        trainer.run()
    assert trainer.completed == 3
    assert torch.equal(learned(trainer), before)
    assert [row["policy/skipped_updates"] for row in rows(tmp_path)[1:]] == [1, 1, 1]
    assert checkpoint.list_checkpoints(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"primary": "tast"}, r"`primary` should be one of .* Found 'tast'. Did you mean 'taste'"),
        ({"bounds": {"prise": 0.5}}, "Found 'prise'. Did you mean 'price'"),
        ({"bounds": {"taste": 0.5, "price": 0.5}}, "leave out the primary"),
        ({"bounds": 1.2}, r"in \[0, 1\]. Found 1.2 for `price`"),
        ({"batch": 0}, "`batch` should be at least 1. Found 0"),
        ({"level_prompts": -1}, "`level_prompts` should be at least 0. Found -1"),
        ({"micro": 0}, "`micro_batch` should be at least 1. Found 0"),
    ],
)
def test_bad_parameters_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, preferences(opposed(1)), **change)
