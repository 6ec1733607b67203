"""However a run ends, the same command goes on: signals, errors from anywhere, a full disk."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from moa_diffusion import assembly
from moa_diffusion.config import check, from_dict
from moa_diffusion.distributed import LocalComm, ProcessError, agreed, share_telling, tells
from moa_diffusion.files import writing as storage
from moa_diffusion.files.writing import StorageError
from moa_diffusion.processes.stopping import Interrupted
from moa_diffusion.scoring import RewardError
from moa_diffusion.storage import checkpoint
from moa_diffusion.storage import log as metrics
from moa_diffusion.storage.log import read_metrics
from moa_diffusion.storage.saving import Saver
from moa_diffusion.storage.trackers import TrackerError
from moa_diffusion.training.loop import Run
from moa_diffusion.types import ConfigError


def red(images, prompts):
    return images[:, 0].mean((1, 2))


def make(folder: Path, resume: str | None = None, **sections: object) -> Run:
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("a\nb\nc\n")
    values = {
        "output_dir": str(folder),
        "resume": resume,
        "policy": {"name": "toy"},
        "sampling": {"steps": 2},
        "prompts": {"train": str(prompts), "heldout": str(prompts)},
        "rewards": {"red": {"path": f"{__file__}:red"}},
        "loss": {"clip_range": 0.2},
        "optimizer": {"lr": 0.03},
        "trainer": {
            "steps": 3,
            "groups": 4,
            "group_size": 4,
            "updates": 2,
            "sample_batch": 8,
            "micro_batch": 8,
        },
        "checkpoint": {"every": 0},
        "evaluation": {"every": 2},
        "log": {"trackers": []},
        **sections,
    }
    config = from_dict(values)
    check(config)
    trainer = assembly.trainer(config)
    trainer.progress.bars = False
    return trainer


def drift(trainer: Run) -> torch.Tensor:
    return trainer.policy.trainable()["drift"].detach().clone()


def rows(folder: Path) -> list[dict]:
    return [
        {name: value for name, value in row.items() if not name.startswith("seconds/")}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, list[dict]]:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    trainer = make(folder)
    trainer.run()
    return drift(trainer), rows(folder)


def goes_on(folder: Path, straight: tuple[torch.Tensor, list[dict]]) -> None:
    """The same command with --resume latest ends as the run that nothing interrupted."""
    resumed = make(folder, resume="latest")
    resumed.run()
    assert torch.equal(drift(resumed), straight[0])
    assert rows(folder) == straight[1]


def at(trainer: Run, moment: str, act: Callable[[], None]) -> None:
    """Act once: drawing rollout 2, between its optimizer steps, in an evaluation, writing."""
    done = []

    def once(due: bool) -> None:
        if due and not done:
            done.append(1)
            act()

    policy, log = trainer.policy, trainer.log
    if moment == "sample":
        sample = policy.sample
        policy.sample = lambda requests, *, step: (
            once(step == 1 and trainer.completed == 1),
            sample(requests, step=step),
        )[1]
    elif moment == "update":
        trainer.learner.stepper.optimizer.register_step_post_hook(
            lambda *_: once(trainer.learner.stepper.updates == 2)
        )
    elif moment in ("first evaluation", "evaluation"):
        generate, wanted = policy.generate, 0 if moment == "first evaluation" else 2
        policy.generate = lambda requests: (
            once(trainer.completed == wanted),
            generate(requests),
        )[1]
    elif moment == "scores":
        write = log.write_scores
        log.write_scores = lambda step, *rest: (once(step == 2), write(step, *rest))[1]
    else:
        write_row = log.write
        log.write = lambda step, row: (write_row(step, row), once(step == 2))[0]


MOMENTS = ["sample", "update", "first evaluation", "evaluation", "scores", "after metrics"]


SAVED = dict(zip(MOMENTS, (1, 1, 0, 2, 1, 2), strict=True))


@pytest.fixture
def terminal() -> Iterator[None]:
    """Also where the tests were started by nohup, which has SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "number",
    [
        *(signal.SIGINT, signal.SIGHUP, signal.SIGTERM),
        *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU),
    ],
)
@pytest.mark.parametrize("moment", ["sample", "first evaluation"])
def test_signals_end_a_run_with_its_state_saved(
    tmp_path, straight, moment, number, capfd, terminal
):
    trainer = make(tmp_path / "run")
    before = signal.getsignal(number)
    at(trainer, moment, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match=f"Stopped by {number.name}") as caught:
        trainer.run()
    assert caught.value.number == number
    assert signal.getsignal(number) == before
    assert ("Ctrl-C again" in capfd.readouterr().err) == (number == signal.SIGINT)
    goes_on(tmp_path / "run", straight)


def test_a_handler_of_somebody_else_keeps_its_signal(tmp_path):
    """As that of ``faulthandler.register(SIGUSR1)``, or of a cluster's own hook."""
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append("hook"))
    try:
        trainer = make(tmp_path / "run")
        at(trainer, "sample", lambda: os.kill(os.getpid(), signal.SIGUSR1))
        trainer.run()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == ["hook"]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    "error",
    [RuntimeError("a bug"), torch.OutOfMemoryError("CUDA out of memory"), SystemExit(3)],
    ids=lambda error: type(error).__name__,
)
def test_any_error_from_anywhere_leaves_a_run_that_goes_on(tmp_path, straight, moment, error):
    trainer = make(tmp_path / "run")

    def fail() -> None:
        raise error.with_traceback(None)

    error.__notes__ = []
    at(trainer, moment, fail)
    with pytest.raises((type(error), ProcessError)) as caught:
        trainer.run()
    saved = checkpoint.step_folder(tmp_path / "run", SAVED[moment])
    assert f"is in {saved}." in caught.value.__notes__[-1]
    goes_on(tmp_path / "run", straight)


def test_the_first_ctrl_c_ends_at_once_while_nothing_has_begun(tmp_path):
    trainer = make(tmp_path / "run")
    trainer.policy.prepare = lambda prompts: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    make(tmp_path / "run").run()


def test_ctrl_c_while_a_checkpoint_is_written_leaves_the_older_one(tmp_path, monkeypatch, straight):
    trainer = make(tmp_path / "run", checkpoint={"every": 1})
    fsync = checkpoint._fsync

    def interrupted(path: Path) -> None:
        if trainer.completed == 2:
            raise KeyboardInterrupt
        fsync(path)

    monkeypatch.setattr(checkpoint, "_fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    names = os.listdir(tmp_path / "run" / "checkpoints")
    assert names == ["step-000001"]
    monkeypatch.undo()
    goes_on(tmp_path / "run", straight)


# ---------------------------------------------------------------------- writing


def full_disk(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """From now on nothing can be flushed to this folder."""
    fsync = checkpoint._fsync

    def full(path: Path) -> None:
        if folder in path.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(path)

    monkeypatch.setattr(checkpoint, "_fsync", full)


def test_a_full_disk_keeps_the_state_elsewhere(tmp_path, monkeypatch, straight):
    run, spare = tmp_path / "run", tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    trainer = make(run, checkpoint={"every": 1})
    at(trainer, "after metrics", lambda: full_disk(monkeypatch, run))
    with pytest.raises(
        ProcessError, match=r"step-000002`: the disk is full \(.* kB are needed, "
    ) as c:
        trainer.run()
    assert os.listdir(run / "checkpoints") == ["step-000001"]
    note = c.value.__notes__[-1]
    assert f"is in {spare}" in note
    assert "Could not write" not in note, "the error has said so"
    monkeypatch.undo()
    command = note.split("`")[-2]
    subprocess.run(command, shell=True, check=True)
    assert shlex.split(command)[-1].startswith(str(run))
    goes_on(run, straight)


def test_no_room_anywhere_names_the_last_whole_checkpoint(tmp_path, monkeypatch, straight):
    run = tmp_path / "run"
    (tmp_path / "spare").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spare"))
    trainer = make(run, checkpoint={"every": 1})
    at(trainer, "after metrics", lambda: full_disk(monkeypatch, tmp_path))
    with pytest.raises(ProcessError, match="the disk is full") as caught:
        trainer.run()
    assert f"The last whole checkpoint is {run / 'checkpoints/step-000001'}" in str(
        caught.value.__notes__
    )
    assert str(caught.value.__notes__).count("Could not write") == 1, "to the spare place"
    assert not os.listdir(tmp_path / "spare")
    monkeypatch.undo()
    goes_on(run, straight)


def test_a_full_disk_is_told_once_whatever_met_it_first(tmp_path, monkeypatch):
    trainer = make(tmp_path / "run")

    def full(path: Path, text: str) -> None:
        full_disk(monkeypatch, tmp_path / "run")
        with storage.writing(path, len(text)):
            raise OSError(errno.ENOSPC, "No space left on device")

    at(trainer, "sample", lambda: monkeypatch.setattr(metrics, "append_text", full))
    with pytest.raises(ProcessError, match=r"metrics\.jsonl`: the disk is full") as caught:
        trainer.run()
    assert "Could not write" not in caught.value.__notes__[-1]
    assert "instead. When there is room" in caught.value.__notes__[-1]


def test_why_the_state_could_not_be_saved_is_said_where_the_error_is_another(tmp_path, monkeypatch):
    trainer = make(tmp_path / "run")

    def fail() -> None:
        full_disk(monkeypatch, tmp_path / "run")
        raise RuntimeError("a bug")

    at(trainer, "sample", fail)
    with pytest.raises(RuntimeError, match="a bug") as caught:
        trainer.run()
    assert caught.value.__notes__[-1].startswith("Could not write `")


@pytest.mark.parametrize("error", [StorageError("full"), TrackerError("Tracker aim failed")])
def test_a_row_that_could_not_be_written_is_made_up(tmp_path, straight, error):
    """With the evaluation in it, which counts once for the alarms."""
    trainer = make(tmp_path / "run")
    write = trainer.log.write

    def fail(step: int, row: dict) -> None:
        if step == 2:
            raise error
        write(step, row)

    trainer.log.write = fail
    with pytest.raises(ProcessError, match=str(error)):
        trainer.run()
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1]
    goes_on(tmp_path / "run", straight)


@pytest.mark.parametrize("name", ["append_text", "write_text"])
def test_every_file_of_a_run_says_where_it_could_not_be_written(tmp_path, monkeypatch, name):
    trainer = make(tmp_path / "run")

    def full(path: Path, text: str) -> None:
        raise StorageError(f"Could not write `{path}`: the disk is full.")

    monkeypatch.setattr(metrics, name, full)
    with pytest.raises((ProcessError, StorageError), match=r"Could not write `.*run/\w+"):
        trainer.run()


# ---------------------------------------------------------------------- the folder afterwards


def broken(images, prompts):
    raise ValueError("broken reward")


def test_a_run_that_failed_before_it_learned_leaves_its_folder_usable(tmp_path, straight):
    reward = {"rewards": {"red": {"path": f"{__file__}:broken"}}}
    for _ in range(2):  # the same command again, and once it is mended
        with pytest.raises(RewardError, match="broken reward"):
            make(tmp_path / "run", **reward, evaluation={"every": 0}).run()
    again = make(tmp_path / "run")
    again.run()
    assert torch.equal(drift(again), straight[0])
    assert rows(tmp_path / "run") == straight[1]


def test_a_run_that_lost_what_it_learned_begins_anew_when_told(tmp_path, straight, caplog):
    make(tmp_path / "run").run()
    for folder in checkpoint.list_checkpoints(tmp_path / "run"):
        (folder / checkpoint.STATE).unlink()
    with pytest.raises(ConfigError, match="begin anew with --resume latest: it has no checkpoint"):
        make(tmp_path / "run")
    goes_on(tmp_path / "run", straight)
    assert "has no checkpoint of the 3 rounds it went: the run begins anew" in caplog.text


def test_a_new_run_leaves_what_is_not_of_a_run_alone(tmp_path):
    for name in ("samples/mine.png", "checkpoints/model.bin", "scores/step-9.csv"):
        (tmp_path / "run" / name).parent.mkdir(parents=True)
        (tmp_path / "run" / name).write_text("mine")
    make(tmp_path / "run").run()
    for name in ("samples/mine.png", "checkpoints/model.bin", "scores/step-9.csv"):
        assert (tmp_path / "run" / name).read_text() == "mine"


def test_there_is_nothing_to_resume_where_nothing_ran(tmp_path):
    with pytest.raises(ConfigError, match="'latest' needs a checkpoint"):
        make(tmp_path / "other", resume="latest")


# ---------------------------------------------------------------------- agreement


class OtherFails(LocalComm):
    """The other of two processes has failed."""

    def any(self, flag: bool) -> bool:
        return True

    def gather_objects(self, local):
        return [*local, ["node-b", ["ConfigError", "prompts: gone"]]]


def test_what_fails_elsewhere_ends_this_process_too():
    told = pytest.raises(ProcessError, match=r"Process 1 \(on node-b\) .* prompts: gone")
    with told as caught, agreed(OtherFails()):
        pass
    assert caught.value.kind == "ConfigError"
    with pytest.raises(ProcessError, match="prompts: gone"), agreed(OtherFails()) as meet:
        meet()
        raise AssertionError("half-way it is known already")
    with pytest.raises(ConfigError, match="mine"), agreed(OtherFails()):
        raise ConfigError("mine")
    with pytest.raises(ProcessError, match="mine") as caught, agreed(LocalComm(), as_one=True):
        raise ConfigError("mine")
    assert isinstance(caught.value.__cause__, ConfigError)


class Nodes(LocalComm):
    """One of several processes, each on a host with an error of its own."""

    def __init__(self, rank: int, everyone: Sequence[object]) -> None:
        self.rank, self.world_size, self.everyone = rank, len(everyone), everyone

    def gather_objects(self, local):
        return self.everyone


@pytest.mark.parametrize(
    ("everyone", "telling"),
    [
        (["a: gone", "a: gone", "b: gone", "b: gone"], [0]),
        (["a: gone", "a: full", "b: gone", "b: gone"], [0, 1, 2]),
        (
            ["a: Process 1 (on a) ended with: gone", "a: gone"]
            + ["b: Process 1 (on a) ended with: gone"] * 2,
            [1, 2],
        ),
        (["a: Process 1 (on a) ended with: gone", "a: gone", "a: full"], [1, 2]),
        (["a: gone"], [0]),
    ],
)
def test_each_error_is_told_once_and_none_is_lost(everyone, telling):
    pairs = [one.split(": ", 1) for one in everyone]
    found = []
    for rank, (_, text) in enumerate(pairs):
        error = RuntimeError(text)
        assert tells(error), "of what the others may not know each process tells"
        share_telling(Nodes(rank, pairs), error)
        found += [rank] * tells(error)
    assert found == telling


def test_where_the_state_was_saved_is_said_by_the_process_that_saved_it(tmp_path):
    """Another one would name, and make, a temporary folder of its own."""
    others = Nodes(1, ["The state after 3 rounds is in /tmp/run-abc instead.", ""])
    saver = Saver(tmp_path / "run", None, None, dict, others, "rounds")
    assert saver.rescue(3, StorageError("full"), alone=False) == others.everyone[0]
    assert not (tmp_path / "run").exists()


def test_a_block_inside_another_asks_the_others_once():
    asked = []

    class Counts(LocalComm):
        def any(self, flag):
            asked.append(flag)
            return flag

    comm = Counts()
    with pytest.raises(ConfigError, match="mine"), agreed(comm), agreed(comm):
        raise ConfigError("mine")
    assert asked == [True]
