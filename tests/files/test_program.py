"""What all commands have, and how they are called: by the way that the process was started."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moa_diffusion.commands import COMMANDS
from moa_diffusion.files import program
from waiting import HANG

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train_sd.py"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program.shutil, "which", lambda name: f"/bin/{name}")


def test_a_script_names_the_scripts_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: None
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    monkeypatch.chdir(ROOT)
    assert program.name() == "train_sd.py"
    assert program.words("evaluate") == "python scripts/evaluate.py"
    assert program.words("rewards") == "python scripts/heads.py"
    assert program.words("recipes") == "moa-diffusion recipes"  # which has no script
    text = "moa-diffusion evaluate --run a; accelerate launch -m moa_diffusion evaluate --run a"
    assert program.described(text, "evaluate") == (
        "python scripts/evaluate.py --run a; accelerate launch scripts/evaluate.py --run a"
    )
    assert program.training("train-sd") == [sys.executable, str(SCRIPT)]
    monkeypatch.chdir(tmp_path)
    shortest = min(os.path.relpath(ROOT / "scripts"), str(ROOT / "scripts"), key=len)
    assert program.words("export") == f"python {shortest}/export.py"


@pytest.mark.parametrize(
    "started", ["/venv/bin/moa-diffusion train-sd", "/a/notebook.py", f"{program.MODULE}.train_sd"]
)
def test_anything_else_names_the_program(
    monkeypatch: pytest.MonkeyPatch, installed: None, started: str
) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    assert program.words("evaluate") == "moa-diffusion evaluate"
    assert program.described("moa-diffusion plan", "plan") == "moa-diffusion plan"
    monkeypatch.setattr(program.shutil, "which", lambda name: None)
    assert program.words("evaluate") == "python -m moa_diffusion evaluate"


@pytest.mark.parametrize(
    ("first", "options"), [("/venv/bin", ["-P", "-m"]), ("", ["-m"]), (os.getcwd(), ["-m"])]
)
def test_a_training_looks_for_modules_where_its_parent_does(
    monkeypatch: pytest.MonkeyPatch, first: str, options: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["moa-diffusion compare"])
    monkeypatch.setattr(sys, "path", [first, *sys.path])
    assert program.training("train-lm") == [sys.executable, *options, "moa_diffusion.train_lm"]


def test_a_checkout_has_its_recipes_beside_the_package() -> None:
    assert program.recipes() == ROOT / "configs"


@pytest.mark.parametrize("module", ["moa_diffusion.__main__", *COMMANDS.values()])
def test_every_command_has_what_all_have(module: str) -> None:
    main = importlib.import_module(module).main
    assert inspect.unwrap(main) is not main


@pytest.mark.parametrize(
    ("command", "unbuffered"),
    [
        ("-m moa_diffusion --help", ""),
        ("-m moa_diffusion recipes", ""),
        ("-m moa_diffusion recipes", "1"),
        ("-m moa_diffusion rewards check jpeg_compressibility", "1"),
        ("scripts/train_sd.py --help all", ""),
    ],
)
def test_a_command_whose_reader_has_ended_ends_without_a_word(
    command: str, unbuffered: str
) -> None:
    """As before ``| head -1``, but the pipe is closed before anything is written."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, *command.split()],
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=HANG,
            check=False,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(("closed", "lines"), [(">&-", 0), ("2>&-", 10), (">&- 2>&-", 0)])
def test_a_command_runs_with_closed_streams(closed: str, lines: int) -> None:
    """As some schedulers and daemons start programs."""
    done = subprocess.run(
        ["/bin/sh", "-c", f'exec "$0" -m moa_diffusion recipes {closed}', sys.executable],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) >= lines


@pytest.mark.parametrize("error", [BrokenPipeError("of a worker"), SystemExit(3)])
def test_any_other_end_is_what_it_was(error: BaseException) -> None:
    @program.entry
    def main() -> int:
        raise error

    with pytest.raises(type(error)) as caught:
        main()
    assert caught.value is error


@pytest.mark.parametrize(("rank", "terminal"), [("0", True), ("0", False), ("1", True)])
def test_libraries_draw_bars_for_the_main_process_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, rank: str, terminal: bool
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert program.entry(lambda: 7)() == 7
    assert os.environ["TQDM_DISABLE"] == ("" if rank == "0" and terminal else "1")
