"""The command line: two processes, kill -9, SIGTERM, bad input.

A process of its own where that is the point; starting one costs more than a small run. Run as a
script, this file is one of two processes.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from moa_diffusion import assembly, tiny
from moa_diffusion.comparison.curves import plot_curves
from moa_diffusion.config import load, parse
from moa_diffusion.storage.log import read_metrics
from waiting import AS_SCRIPT, HANG, python, running, wait_for, wait_until

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "train_sd.py"
ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "true"}
WEIGHTS = "pytorch_lora_weights.safetensors"
FAST = {
    "policy": {"path": "tiny", "max_sequence_length": 16, "step_batch": 2, "lora": {"rank": 4}},
    "sampling": {"resolution": 32, "steps": 3, "guidance": 1.0},
    "prompts": {"train": "tiny"},
    "rewards": {"prompt_colour": {}, "colourfulness": {"weight": 0.5}},
    "loss": {"clip_range": 1e-3, "kl_weight": 0.01},
    "optimizer": {"lr": 1e-3},
    "trainer": {
        "steps": 3,
        "groups": 4,
        "group_size": 2,
        "updates": 2,
        "sample_batch": 2,
        "micro_batch": 2,  # fits into the share of each of two processes
    },
    "evaluation": {"every": 0},
    "checkpoint": {"every": 1, "keep": 0},
    "log": {"trackers": []},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "fast.yaml"
    path.write_text(yaml.safe_dump(FAST))
    return path


def launcher_of(name: str) -> list[str]:
    if name == "accelerate":
        return [python(), "-m", "accelerate.commands.accelerate_cli", "launch"]
    if name == "python":
        return [python()]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [python(), *two, "--shutdown-timeout", str(int(HANG))]  # after a signal


def arguments(config: Path, output: Path, *options: str) -> list[str]:
    return [str(SCRIPT), "--config", str(config), "--output_dir", str(output), *options]


def command(config: Path, output: Path, *options: str, launcher: str = "python") -> list[str]:
    return [*launcher_of(launcher), *arguments(config, output, *options)]


def train(
    config: Path, output: Path, *options: str, launcher: str = "python"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(config, output, *options, launcher=launcher),
        env=ENVIRONMENT,
        cwd=config.parent,
        capture_output=True,
        text=True,
        timeout=HANG,
    )


Here = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Runs the script in this process: exit status, stdout, stderr."""

    def start(config: Path, output: Path, *options: str) -> tuple[int, str, str]:
        monkeypatch.chdir(config.parent)
        monkeypatch.setattr(sys, "argv", arguments(config, output, *options))
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        printed = capsys.readouterr()
        return int(str(ended.value.code)), printed.out, printed.err

    return start


def adapter(run: Path, step: int, kind: str = "") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:06d}" / kind / WEIGHTS)


def numbers(run: Path) -> list[dict[str, Any]]:
    """Metrics without what a clock says."""
    return [
        {name: value for name, value in row.items() if not name.startswith("seconds/")}
        for row in read_metrics(run / "metrics.jsonl")
    ]


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_a_run_leaves_what_the_readme_promises(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = train(
        config,
        run,
        *("--log.trackers", '["tensorboard"]', "--prompts.heldout", "tiny"),
        *("--evaluation.every", "2", "--evaluation.steps", "3", "--evaluation.prompts", "4"),
        *("--trainer.steps", "2"),
        launcher="accelerate",
    )
    assert done.returncode == 0, done.stderr
    assert "Processes: 1" in done.stdout
    assert done.stdout.count("Evaluation after 2 rollouts: ") == 1
    assert done.stdout.count("Done: 2 of 2 rollouts, ") == 1
    assert "\r" not in done.stdout + done.stderr  # no bars in a file, not even of libraries
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    names = {name for row in rows for name in row}
    for name in (
        *("reward_mean/colourfulness", "reward_std/colourfulness", "weight/colourfulness"),
        *("share/colourfulness", "zero_variance/colourfulness", "applies/colourfulness"),
        *("policy/kl", "policy/clip_fraction", "policy/grad_norm", "policy/lr"),
        *("policy/skipped_updates", "seconds/sample", "seconds/score", "seconds/update"),
        *("seconds/total", "eval_mean/prompt_colour", "eval_sem/prompt_colour"),
    ):
        assert name in names, name
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["trainer"]["steps"] == 2
    assert resolved["loss"]["advantage_clip"] == 5.0
    assert len((run / "scores" / "step-000002.jsonl").read_text().splitlines()) == 8
    assert (run / "samples" / "step-000000.png").stat().st_size > 0
    assert list((run / "trackers").rglob("events.out.tfevents.*"))
    saved = run / "checkpoints" / "step-000002"
    assert (saved / WEIGHTS).is_file()
    assert (saved / "ema" / WEIGHTS).is_file()

    plot_curves({"mine": run}, tmp_path / "plot.png", shown=3)
    with Image.open(tmp_path / "plot.png") as drawn:
        assert drawn.width > 400
        assert len(drawn.convert("RGB").getcolors(maxcolors=2**24)) > 1000


METHODS = {
    "dual_stage": {},
    "upgrad": {},  # fused: the rows of all objectives in the training's own backward passes
    "apex": {"weighting": {"conflict": "gradients", "warmup": 1}},  # a probe in each rollout
    # A pool of the reference's rewards. The default gain of 20 would multiply rounding as well.
    "mopo": {"normalizer": {"pool_size": 3}, "weighting": {"proportional": 1.0}},
}

ROLLOUTS = 2
# The second rollout's window is not first, so siblings share the step before it.
SHARED = {"shared_start": True, "window": 1, "window_mode": "slide", "window_stay": 1}


def write_config(path: Path, method: str) -> None:
    settings = FAST | {
        "trainer": {**FAST["trainer"], "steps": ROLLOUTS},
        "objectives": {"method": method, **METHODS[method]},
        "sampling": {**FAST["sampling"], **(SHARED if method == "mopo" else {})},
    }
    path.write_text(yaml.safe_dump(settings))


# Every method on a toy policy: tests/test_distributed.py.
COMPARED = ("mopo", "upgrad", "dual_stage")  # on two processes
LARGE = ("--trainer.micro_batch", "4")


def one_of_two_processes(folder: Path) -> None:
    """The last method through the script, which also leaves the process group."""
    runs = [arguments(folder / f"{m}.yaml", folder / m) for m in COMPARED]
    for run in runs[:-1]:
        assembly.trainer(parse(run[1:])).run()
    sys.argv = runs[-1]
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each method on two processes, started once for all of them."""
    folder = tmp_path_factory.mktemp("two")
    for method in COMPARED:
        write_config(folder / f"{method}.yaml", method)
    done = subprocess.run(
        [*launcher_of("two"), __file__, str(folder)],
        env=ENVIRONMENT | AS_SCRIPT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    # A launcher may silently start one process: then the tests would check nothing.
    assert done.stdout.count("Processes: 2 ") == len(COMPARED)
    assert done.stdout.count(f"Done: {ROLLOUTS} of {ROLLOUTS} rollouts, ") == len(COMPARED)
    return folder


@pytest.mark.parametrize("method", COMPARED)
def test_one_and_two_processes_and_any_micro_batch_end_alike(
    two_processes: Path, here: Here, tmp_path: Path, method: str
) -> None:
    write_config(tmp_path / "fast.yaml", method)
    one, cut = tmp_path / "one", tmp_path / "cut"
    runs = {one: (), cut: LARGE} if method == "dual_stage" else {one: ()}
    for run, options in runs.items():
        status, said, log = here(tmp_path / "fast.yaml", run, *options)
        assert status == 0, log
        assert "Processes: 1 " in said
    # Two processes make the same forward passes; those of another size sum in another order, and
    # two rollouts on rewards that do not jump multiply their rounding little.
    for run, most in ((two_processes / method, 0.0), *((run, 1e-5) for run in runs.keys() - {one})):
        assert difference(adapter(one, ROLLOUTS), adapter(run, ROLLOUTS)) <= most
        for mine, theirs in zip(numbers(one), numbers(run), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_two_nodes_train_what_two_processes_of_one_do(two_processes: Path, tmp_path: Path) -> None:
    """Two launchers that meet at an address, with folders of their own and the run's in common."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = tmp_path / "programs" / "torchrun"
    torchrun.parent.mkdir()
    torchrun.write_text(f'#!/bin/sh\nexec {python()} -m torch.distributed.run "$@"\n')
    torchrun.chmod(0o755)
    search = os.pathsep.join((str(torchrun.parent), os.environ["PATH"]))
    meeting = {"MASTER": "127.0.0.1", "PORT": str(port), "NODES": "2", "GPUS": "1"}
    with ExitStack() as stack:
        nodes = []
        for name in ("first", "second"):
            folder = tmp_path / name
            folder.mkdir()
            write_config(folder / "fast.yaml", "dual_stage")
            launch = ["bash", str(ROOT / "configs" / "launch" / "torchrun.sh")]
            launch += ["--config", "fast.yaml", "--output_dir", str(tmp_path / "run")]
            with (folder / "log.txt").open("w") as log:
                node = running(
                    launch,
                    env=ENVIRONMENT | meeting | {"PATH": search},
                    cwd=folder,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
                nodes.append((stack.enter_context(node), folder / "log.txt"))
        for process, written in nodes:
            assert process.wait(HANG) == 0, written.read_text()
    assert "".join(written.read_text() for _, written in nodes).count("Processes: 2 ") == 1
    expected = adapter(two_processes / "dual_stage", ROLLOUTS)
    assert difference(expected, adapter(tmp_path / "run", ROLLOUTS)) == 0


@pytest.mark.parametrize("method", ["upgrad", "apex"])
def test_gradients_of_all_objectives_in_float16(here: Here, tmp_path: Path, method: str) -> None:
    """With a loss scale: inside the optimizer step (upgrad), and as a probe (apex)."""
    write_config(tmp_path / "fast.yaml", method)
    run = tmp_path / "run"
    half = ("--policy.dtype", "float16", "--loss.kl_weight", "0")
    half += ("--sampling.resolution", "16", "--trainer.groups", "2")  # a CPU computes it slowly
    half += ("--trainer.group_size", "3")  # of two siblings the advantages may cancel exactly
    status, _, log = here(tmp_path / "fast.yaml", run, *half)
    assert status == 0, log
    rows = numbers(run)
    assert [row["policy/skipped_updates"] for row in rows] == [0, 0]
    assert all(row["policy/grad_norm"] > 0 for row in rows)


# Waits in the second rollout for as long as it may not go on.
PATIENT = """
import os, time

def one(images, prompts):
    while os.path.exists("hold") and os.path.exists("cut/checkpoints/step-000001/state.pt"):
        open("held", "w").close()
        time.sleep(0.02)
    return [1.0] * len(prompts)
"""


def test_killed_and_resumed_equals_uninterrupted(config: Path, here: Here, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    (tmp_path / "mine.py").write_text(PATIENT)
    options = ("--objectives.method", "dual_stage")
    options += ("--rewards.mine.path", "mine.py:one")
    assert here(config, whole, *options)[0] == 0
    (tmp_path / "hold").touch()
    with running(
        command(config, cut, *options), env=ENVIRONMENT, cwd=tmp_path, stderr=subprocess.DEVNULL
    ) as process:
        wait_for(tmp_path / "held", process)
        process.kill()
    (tmp_path / "hold").unlink()
    assert not (cut / "checkpoints" / "step-000002").exists()
    status, _, log = here(config, cut, *options, "--resume", "latest")
    assert status == 0, log
    for kind in ("", "ema"):
        assert difference(adapter(whole, 3, kind), adapter(cut, 3, kind)) == 0
    assert numbers(whole) == numbers(cut)
    assert (whole / "scores/step-000003.jsonl").read_text() == (
        cut / "scores/step-000003.jsonl"
    ).read_text()


@pytest.mark.parametrize("launcher", ["python", "two"])
def test_sigterm_saves_and_exits_0(config: Path, tmp_path: Path, launcher: str) -> None:
    """With a reward that is found in a module of the working folder."""
    (tmp_path / "mine.py").write_text("def one(images, prompts):\n    return [1.0] * len(prompts)")
    run = tmp_path / "run"
    endless = ("--rewards.mine.path=mine:one", "--trainer.steps=1000", "--checkpoint.every=0")
    with running(
        command(config, run, *endless, launcher=launcher),
        env=ENVIRONMENT,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
    ) as process:
        wait_for(run / "metrics.jsonl", process)
        process.terminate()
        _, log = process.communicate(timeout=HANG)
    assert process.returncode == (launcher == "two"), log  # torchrun itself never returns 0
    assert "Stopped by SIGTERM. The state after" in log
    rows = read_metrics(run / "metrics.jsonl")
    assert rows[0]["reward_mean/mine"] == 1.0
    assert (run / "checkpoints" / f"step-{len(rows):06d}" / "state.pt").is_file()


REWARDS_FILE = """
import torch

calls = 0

def short(images, prompts):
    return [0.0]

def infinite(images, prompts):
    global calls
    calls += 1
    return [1.0 + i for i in range(len(prompts) - 1)] + [float("inf") if calls > 5 else 0.0]
"""


# huggingface_hub warns, because diffusers gives it an option of old.
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")
def test_bad_input_says_what_was_expected_and_found(
    config: Path, here: Here, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a red circle"}\n{"text": 1}\n')
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (tmp_path / "hollow").mkdir()
    index = tiny.PIPELINE_PATH / "model_index.json"
    (tmp_path / "hollow" / "model_index.json").write_text(index.read_text())
    shutil.copytree(
        tiny.PIPELINE_PATH,
        tmp_path / "weightless",
        ignore=shutil.ignore_patterns("*.safetensors"),
    )
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "metrics.jsonl").write_text('{"step": 7}\n')
    cases = [
        (["--trainer.step", "3"], "trainer.step: unknown key. Did you mean 'trainer.steps'?"),
        (["--rewards.ocrr.weight", "1"], 'rewards.ocrr: Unknown reward head "ocrr". Did you mean'),
        (["--prompts.train", "none.txt"], "Prompt file `none.txt` does not exist"),
        (["--prompts.train", "empty.txt"], "should hold at least one prompt"),
        (["--prompts.train", "bad.jsonl"], "bad.jsonl:2: A line should have a non-empty text"),
        (["--trainer.group_size", "1"], "trainer.group_size: should be at least 2. Found 1"),
        (["--trainer.groups", "3", "--trainer.updates", "5"], "should be a multiple of"),
        (["--output_dir", "empty.txt/run"], "output_dir: should be a folder. Found the file"),
        (["--policy.embeds_dir", "empty.txt"], "policy.embeds_dir: should be a folder. Found"),
        (["--output_dir", "used"], "should be a new folder. Found another run in `used`"),
        (["--resume", "latest"], "'latest' needs a checkpoint"),
        (["--resume", "nowhere"], "Found no state.pt in `nowhere`"),
        (["--policy.path", "other"], "should be a Stable Diffusion 3 pipeline. Found 'FluxPipe"),
        (["--policy.path", "hollow"], "policy.path: the configuration files in 'hollow' are mis"),
        (["--policy.path", "weightless"], "policy.path: the weights in 'weightless' are missing"),
        (["--policy.path", "nothing/there"], "policy.path: should be a folder with"),
        (["--objectives.method", "gdp"], "unknown method 'gdp'. Did you mean 'gdpo'?"),
        (["--sampling.resolution", "60"], "sampling.resolution: should be a multiple of 16"),
        (["--policy.lora.target_modules", '["to_x"]'], "Found no layer that ends in 'to_x'"),
    ]
    for options, message in cases:
        status, _, log = here(config, tmp_path / "run", *options)
        assert status == 2, (options, log)
        assert message in log, (options, log)
    assert not (tmp_path / "run").exists()


def test_a_failing_reward_stops_the_run_after_saving(
    config: Path, here: Here, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(REWARDS_FILE)
    run = tmp_path / "run"
    status, _, log = here(config, run, "--rewards.mine.path=mine.py:infinite")
    assert status == 1, log
    assert 'Reward head "mine" failed on sample' in log
    assert "Found inf" in log
    assert (run / "checkpoints" / "step-000001" / "state.pt").is_file()
    assert len(list((run / "scores").glob("*"))) == 1


def test_a_reward_that_always_fails_costs_two_samples_and_no_folder(
    config: Path, here: Here, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mine.py").write_text(REWARDS_FILE)
    run = tmp_path / "run"
    status, _, log = here(config, run, "--rewards.mine.path=mine.py:short")
    assert status == 1, log
    assert 'Reward head "mine" failed on samples #0' in log
    assert "shape [2]. Found [1]" in log
    assert not (run / "checkpoints").exists()
    (tmp_path / "mine.py").unlink()
    (tmp_path / "mended.py").write_text(
        "def short(images, prompts):\n    return [0.0] * len(prompts)"
    )
    status, _, log = here(
        config, run, "--rewards.mine.path=mended.py:short", "--trainer.steps", "1"
    )
    assert status == 0, log
    assert "Nothing can be learned from the reward mine in the first rollout" in caplog.text


def test_a_wrong_option_of_a_reward_is_told_the_nearest(
    config: Path, here: Here, tmp_path: Path
) -> None:
    status, _, log = here(config, tmp_path / "run", "--rewards.ocr.wieght", "2")
    assert status == 2
    assert "rewards.ocr: unknown option 'wieght'. Did you mean 'weight'? Valid: engine, " in log
    assert "weight, head, path." in log


def test_a_reward_server_that_dies_stops_the_run_after_saving(
    config: Path, here: Here, tmp_path: Path
) -> None:
    serve = [python(), str(ROOT / "scripts" / "heads.py"), "serve"]
    for seconds in (5.0, 50.0, 500.0):  # a busy machine does not score a rollout in time
        run = tmp_path / f"run-{seconds:g}"
        over = threading.Event()
        with running(
            [*serve, "--heads", "sharpness", "--port", "0"], stdout=subprocess.PIPE
        ) as server:
            assert server.stdout is not None
            url = next(re.findall(r"http://\S+", x) for x in server.stdout if "Serving" in x)

            def die_after_a_rollout(run: Path, over: threading.Event, server: Any) -> None:
                wait_until(lambda: (run / "metrics.jsonl").exists() or over.is_set(), "no rollout")
                server.kill()

            remote = {"head": "remote", "url": url, "remote_name": "sharpness", "timeout": seconds}
            endless = ("--trainer.steps", "1000", "--checkpoint.every", "0")
            killer = threading.Thread(target=die_after_a_rollout, args=(run, over, server))
            killer.start()
            try:
                status, _, log = here(config, run, *endless, "--rewards.sharp", json.dumps(remote))
            finally:
                over.set()
                killer.join()
        if (run / "metrics.jsonl").exists():
            break
    assert status == 1, log
    assert 'error: Reward head "sharp" failed on samples #0' in log
    assert url[0] in log
    rows = read_metrics(run / "metrics.jsonl")
    assert rows[0]["reward_mean/sharp"] > 0
    assert (run / "checkpoints" / f"step-{len(rows):06d}" / "state.pt").is_file()
    (noted,) = json.loads((run / "rewards.json").read_text())
    assert noted["heads"]["sharp"]["head"] == "RemoteHead"


def test_print_config_is_a_config(config: Path, here: Here) -> None:
    words = ("--objectives.method", "apex", "--objectives.weighting.conflict", "off")
    status, said, _ = here(config, config.parent / "run", "--print_config", *words)
    assert status == 0
    (printed := config.parent / "printed.yaml").write_text(said)
    assert load(printed).trainer.groups == 4
    assert load(printed).objectives.weighting == {"conflict": "off"}


def test_shipped_prompts_are_named_tiny() -> None:
    assert json.loads((tiny.PIPELINE_PATH / "model_index.json").read_text())["_class_name"]


if __name__ == "__main__":
    one_of_two_processes(Path(sys.argv[1]))
