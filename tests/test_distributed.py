"""Collectives, and that two processes with half of the samples each train the same parameters.

Run as a script, this file is one of the two processes.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from moa_diffusion.distributed import LocalComm, local_slice
from moa_diffusion.storage.log import read_metrics
from waiting import HANG, two_processes

ROOT = Path(__file__).parents[1]
PROMPTS = ["a", "bb", "cccc"]
# Those that remember, draw a reference pool, measure gradients, or weigh every sample by itself.
OBJECTIVES = {
    "apex": {"method": "apex", "weighting": {"warmup": 1, "conflict": "gradients"}},
    "chebyshev": {"method": "chebyshev"},
    "ddpo": {"method": "ddpo", "normalizer": {"size": 8, "min_count": 4}},
    "mopo": {"method": "mopo", "normalizer": {"pool_size": 3}},
    "pama": {"method": "pama"},
    "pama_vector": {"method": "pama_vector"},
    "upgrad": {"method": "upgrad"},
}


def red(images, prompts):
    return images[:, 0].mean((1, 2))


def length(images, prompts):
    return [float(len(prompt)) for prompt in prompts]


def fails_on_one_process(images, prompts):
    if os.environ.get("RANK") == "1":
        raise OSError("disk gone")
    return [0.0] * len(prompts)


def green(images, prompts):
    return images[:, 1].mean((1, 2)) - 0.5 * images[:, 0].mean((1, 2))


def make(folder: Path, *rewards: str, **sections: object):
    """A toy run; the sizes are those of the whole rollout, whatever the number of processes."""
    from moa_diffusion import assembly
    from moa_diffusion.config import check, from_dict

    prompts = folder.parent / "prompts.txt"
    if not prompts.exists():  # the processes share it
        prompts.write_text("\n".join(PROMPTS))
    config = from_dict(
        {
            "output_dir": str(folder),
            "policy": {"name": "toy"},
            "sampling": {"steps": 2},
            "prompts": {"train": str(prompts), "heldout": str(prompts)},
            "rewards": {name: {"path": f"{__file__}:{name}"} for name in rewards},
            "loss": {"clip_range": 0.2, "kl_weight": 0.01},
            "optimizer": {"lr": 0.03},
            "ema": {"decay": 0.5, "every": 2},
            "trainer": {
                "steps": 4,
                "groups": 4,
                "group_size": 4,
                "updates": 2,
                "sample_batch": 4,
                "micro_batch": 4,
            },
            "checkpoint": {"every": 2},
            "evaluation": {"every": 2},
            "log": {"trackers": []},
            **sections,
        }
    )
    check(config)
    trainer = assembly.trainer(config)
    trainer.progress.bars = False
    return trainer


# ---------------------------------------------------------------------- one of two processes


def check_collectives(comm) -> None:
    assert comm.world_size == 2, "a test of one process would check nothing"
    mine = torch.arange(6).reshape(2, 3) + 100 * comm.rank
    both = torch.cat([torch.arange(6).reshape(2, 3), torch.arange(6).reshape(2, 3) + 100])
    for kind in (torch.float64, torch.float32, torch.int64):
        assert torch.equal(comm.gather(mine.to(kind)), both.to(kind))
    # A view that is not contiguous, as a transposed reward matrix is.
    assert torch.equal(comm.gather(mine.double().T.contiguous().T), both.double())
    assert torch.equal(local_slice(both, comm), mine)
    assert local_slice(("a", "b", "c", "d"), comm) == (("a", "b"), ("c", "d"))[comm.rank]

    pair = [torch.full((2, 2), 1.0 + comm.rank), torch.tensor(10.0 * comm.rank)]
    comm.sum_(pair)
    assert torch.equal(pair[0], torch.full((2, 2), 3.0))
    assert float(pair[1]) == 10
    comm.sum_([])

    counts = torch.tensor([2**40 + comm.rank])
    comm.sum_([counts])
    assert counts.tolist() == [2**41 + 1]

    weights = torch.tensor([0.1 + comm.rank, 0.2]).double()
    comm.broadcast_(weights)
    assert torch.equal(weights, torch.tensor([0.1, 0.2]).double())

    assert comm.any(comm.rank == 0)
    assert comm.any(comm.rank == 1)
    assert not comm.any(False)
    comm.barrier()


def check_failures(folder: Path) -> None:
    from moa_diffusion.distributed import ProcessError
    from moa_diffusion.processes.stopping import Interrupted
    from moa_diffusion.scoring import RewardError

    failing = make(folder / "failing", "red", "fails_on_one_process")
    try:
        failing.run()
    except (RewardError, ProcessError) as error:
        assert "disk gone" in str(error), error
        assert isinstance(error, RewardError) == (failing.comm.rank == 1)
    else:
        raise AssertionError("both processes should have raised")

    stopped = make(folder / "stopped", "red")
    if stopped.comm.rank == 1:
        prepare = stopped.policy.prepare

        def prepare_and_ask_to_stop(prompts):
            prepare(prompts)
            stopped.progress.stop.ask(signal.SIGTERM)

        stopped.policy.prepare = prepare_and_ask_to_stop
    try:
        stopped.run()
    except Interrupted:
        assert stopped.completed == 0
    else:
        raise AssertionError("both processes should have stopped")


def check_disagreement(folder: Path) -> None:
    """What differs or fails on one process ends both, with the reason, and before they train."""
    from moa_diffusion.distributed import ProcessError
    from moa_diffusion.types import ConfigError

    rank = int(os.environ["RANK"])
    own = folder / f"own-{rank}.txt"

    def prompts(train: Path) -> dict[str, str]:
        return {"train": str(train), "heldout": str(folder / "prompts.txt")}

    own.write_text("\n".join([*PROMPTS, str(rank)]))
    cases = [  # what the processes find, and what each of them says of it
        ({"seed": rank}, "seed: should be the same", "Found 0 on process 0"),
        ({"prompts": prompts(folder / "none.txt")} if rank else {}, "none.txt", "does not exist"),
        ({"resume": "latest"} if rank else {}, "needs a checkpoint", "needs a checkpoint"),
        ({"prompts": prompts(own)}, "prompts.train: should be the same", "own-1.txt"),
    ]
    for number, (sections, *messages) in enumerate(cases):
        try:
            make(folder / f"disagreeing-{number}", "red", **sections)
        except (ConfigError, ProcessError) as error:
            for message in messages:
                assert message in str(error), error
        else:
            raise AssertionError(f"both processes should have refused case {number}")
        assert not (folder / f"disagreeing-{number}").exists()

    # The same file name, but another content on the other node.
    shared = Path.read_bytes

    def other_content(path: Path) -> bytes:
        data = shared(path)
        return data.replace(b"cccc", b"dddd") if rank and path.name == "prompts.txt" else data

    Path.read_bytes = other_content  # type: ignore[method-assign]
    try:
        make(folder / "disagreeing", "red")
    except ConfigError as error:
        assert "contents of prompts.train: should be the same" in str(error), error
    else:
        raise AssertionError("both processes should have refused")
    finally:
        Path.read_bytes = shared  # type: ignore[method-assign]


def check_launch(folder: Path) -> None:
    """The scripts' exit status is 2 on both if the command line is wrong on one."""
    from moa_diffusion import assembly
    from moa_diffusion.commands import evaluate
    from moa_diffusion.config.command_line import read_command_line
    from moa_diffusion.training.launch import launch

    rank, recipe = int(os.environ["RANK"]), folder / "run" / "config.yaml"
    sys.argv = ["train_sd.py", "--config", str(folder / "lost.yaml" if rank else recipe)]
    assert launch(assembly.trainer, read_command_line()) == 2
    # A folder each, as two nodes without a shared disk have.
    sys.argv = ["train_sd.py", "--config", str(recipe)]
    sys.argv += ["--output_dir", str(folder / ("nothing" if rank else "run")), "--resume", "latest"]
    assert launch(assembly.trainer, read_command_line()) == 2
    sys.argv = ["train_sd.py", "--config", str(folder / "absent.yaml")]
    assert launch(assembly.trainer, read_command_line()) == 2
    sys.argv = ["evaluate.py", "--pipeline", "tiny", "--checkpoints", "base"]
    sys.argv += ["--rewards", "jpeg_compressibility", "--output", str(folder / "evaluate")]
    sys.argv += ["--prompts", str(folder / ("missing.txt" if rank else "prompts.txt"))]
    assert evaluate.main() == 2
    assert not (folder / "evaluate").exists()


def check_a_write_that_fails(folder: Path) -> None:
    """Only the first process writes; if it cannot, the other ends with it, and nothing is lost."""
    from moa_diffusion.distributed import ProcessError
    from moa_diffusion.storage import checkpoint

    full = make(folder / "full", "red")

    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    if full.comm.rank == 0:
        full.log.write_scores = no_space
    try:
        full.run()
    except ProcessError as error:
        assert "No space left" in str(error), error
    else:
        raise AssertionError("both processes should have ended")
    assert (checkpoint.step_folder(folder / "full", 0) / checkpoint.STATE).is_file()


def main(folder: Path) -> None:
    signal.alarm(int(HANG))  # a collective that waits for ever ends here
    trainer = make(folder / "run", "red", "length")
    check_collectives(trainer.comm)
    trainer.run()
    torch.save(trainer.state_dict(), folder / f"rank-{trainer.comm.rank}.pt")
    for name, objectives in OBJECTIVES.items():
        one = make(folder / name, "red", "green", objectives=objectives)
        one.run()
        if one.comm.rank == 0:
            torch.save(one.state_dict(), folder / f"{name}.pt")
    check_failures(folder)
    check_disagreement(folder)
    check_launch(folder)
    check_a_write_that_fails(folder)
    trainer.close()
    assert not torch.distributed.is_initialized()


# ---------------------------------------------------------------------- tests


def test_one_process_is_the_identity():
    comm = LocalComm()
    values = torch.arange(4.0)
    assert comm.gather(values) is values
    comm.sum_([values])
    comm.broadcast_(values)
    comm.barrier()
    assert values.tolist() == [0, 1, 2, 3]
    assert comm.any(True)
    assert not comm.any(False)
    assert torch.equal(local_slice(values, comm), values)


def test_a_share_must_be_even():
    comm = LocalComm()
    comm.world_size = 3
    comm.rank = 1
    assert local_slice(tuple("abcdef"), comm) == ("c", "d")
    with pytest.raises(ValueError, match=r"multiple of the 3 processes\. Found 4 samples"):
        local_slice(tuple("abcd"), comm)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs this file twice, as torchrun would start it."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    outputs = two_processes(__file__, folder)
    assert "Processes: 2 (cpu, " in outputs[0]
    assert "Processes:" not in outputs[1], "only the first process should print"
    return folder


def test_collectives_of_two_processes(both):
    """The checks ran inside, see ``check_collectives``; each process wrote this as the last."""
    assert (both / "rank-0.pt").is_file()
    assert (both / "rank-1.pt").is_file()


def test_both_processes_hold_the_same_state(both):
    first, second = (torch.load(both / f"rank-{rank}.pt") for rank in range(2))
    one, other = first["updater"], second["updater"]
    assert torch.equal(one["trainable"]["drift"], other["trainable"]["drift"])
    assert torch.equal(one["ema"]["average"]["drift"], other["ema"]["average"]["drift"])
    assert torch.equal(first["normalizer"]["spread"], second["normalizer"]["spread"])


def test_an_error_is_told_by_one_process_of_a_node(both):
    """Which is the one that has it, and the first if all have."""
    logs = [(both / f"output-{rank}.txt").read_text().splitlines() for rank in range(2)]
    for words, expected in (
        ("lost.yaml", [0, 1]),
        ("needs a checkpoint", [0, 1]),
        ("absent.yaml", [1, 0]),
        ("missing.txt", [0, 1]),
    ):
        told = [sum("error: " in line and words in line for line in log) for log in logs]
        assert told == expected, words


def test_two_processes_train_the_parameters_of_one(both, tmp_path):
    alone = make(tmp_path / "run", "red", "length")
    alone.run()
    shared = torch.load(both / "rank-0.pt")["updater"]
    drift = alone.policy.trainable()["drift"].detach()
    assert drift.abs().max() > 0.1
    # The same forward passes on the same machine, and sums that no order changes.
    assert torch.equal(shared["trainable"]["drift"], drift)
    assert torch.equal(
        shared["ema"]["average"]["drift"], alone.learner.stepper.ema.average["drift"]
    )
    found, expected = (
        read_metrics(folder / "run" / "metrics.jsonl") for folder in (both, tmp_path)
    )
    assert [row["step"] for row in found] == [0, 1, 2, 3, 4]
    for mine, other in zip(found, expected, strict=True):
        # Rewards and parameters are the same bits; means over two processes add up in another
        # order, and the gap of log-probs in float32 is 1e-6 at most.
        assert {k: v for k, v in mine.items() if not k.startswith("seconds/")} == pytest.approx(
            {k: v for k, v in other.items() if not k.startswith("seconds/")}, abs=1e-5
        )
    # Three held-out prompts on two processes: none is counted twice.
    assert found[0]["eval_mean/length"] == pytest.approx(sum(map(len, PROMPTS)) / 3)
    sheets = [folder / "run/samples/step-000004.png" for folder in (both, tmp_path)]
    assert sheets[0].read_bytes() == sheets[1].read_bytes(), "the sheet lacks a rank's images"


@pytest.mark.parametrize("method", OBJECTIVES)
def test_two_processes_equal_one_for_every_method(both, tmp_path, method):
    alone = make(tmp_path / "run", "red", "green", objectives=OBJECTIVES[method])
    alone.run()
    shared = torch.load(both / f"{method}.pt")
    drift = alone.policy.trainable()["drift"].detach()
    assert drift.abs().max() > 0.01
    assert torch.equal(shared["updater"]["trainable"]["drift"], drift)
    for name, value in alone.learner.weighting.state_dict().items():
        if isinstance(value, torch.Tensor):
            # Made of gathered rewards, or of a Gramian whose sum over processes rounds in float32.
            torch.testing.assert_close(
                shared["weighting"][name], value, rtol=0, atol=1e-5, equal_nan=True
            )


def test_scores_of_two_processes_are_in_the_order_of_the_samples(both, tmp_path):
    make(tmp_path / "run", "red", "length").run()
    for path in (tmp_path / "run" / "scores").iterdir():
        other = both / "run" / "scores" / path.name
        keys = ["group", "sibling", "prompt", "seed"]
        found, expected = (
            [[row[key] for key in keys] for row in read_metrics(file)] for file in (other, path)
        )
        assert found == expected


def test_only_one_process_writes_checkpoints(both):
    names = sorted(path.name for path in (both / "run" / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000004"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
