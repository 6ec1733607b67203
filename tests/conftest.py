"""What holds for every test: no network, few threads, Ctrl-C works."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported: before any import
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["ACCELERATE_USE_CPU"] = "true"  # what tests compare to the bit is the CPU's
# A graph that an earlier run compiled for another instruction set would be taken as it is.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "0"
# One thread unless the environment asks for more; read when torch is imported, here and in the
# processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from waiting import WARM, python, warm_python

REAL_PYTHON = "real_python"

# No test of this process survives a power cut, and waiting for the disk costs milliseconds a call.
# What is left of the call is that the file has to be open.
os.fsync = os.fstat  # type: ignore[assignment]

# Shells start background jobs with SIGINT ignored, and what ignores it passes that on.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Workers, and the processes that their tests start, are forks of one that has imported torch.

    Who only hands out tests imports neither torch nor what needs it.
    """
    if config.getoption("dist", "no") == "no" or config.option.collectonly:
        config.pluginmanager.import_plugin("zoo")  # its fixtures
    elif sys.platform == "linux":
        os.environ[WARM] = str(warm_python())
        config.option.tx = [f"popen//python={python()}"] * len(config.option.tx)
    if REAL_PYTHON in (given := getattr(config, "workerinput", {})):
        sys.executable = given[REAL_PYTHON]


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """A worker that is such a fork learns which program Python itself is."""
    node.workerinput[REAL_PYTHON] = sys.executable


def pytest_collection(session: pytest.Session) -> None:
    """Importing makes a million objects and hardly any garbage: a collector looks in vain."""
    gc.disable()


def pytest_collection_finish(session: pytest.Session) -> None:
    """What stays until the end is looked through no more."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Libraries complain of what is still there when they are taken apart."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    """What measures or builds sets a number of threads; the next test has that of the others."""
    import torch

    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of the test's own, and a working folder beside it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the runs a and b, with prompts and rewards of one's own beside them."""
    from evaluated_runs import make_two_runs

    return make_two_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def evaluated(two_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder and samples of an evaluation of both runs."""
    from evaluated_runs import evaluate_two_runs

    return evaluate_two_runs(two_runs, tmp_path_factory.mktemp("evaluated"))


@pytest.fixture
def heads_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`scripts/heads.py` in this process: exit status, stdout, stderr."""
    from heads_command import starter

    return starter(monkeypatch, capsys)
