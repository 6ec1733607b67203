"""`scripts/heads.py`: its old name, and its server."""

from __future__ import annotations

import json
import re
import runpy
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from heads_command import HeadsCommand

from rewards import RewardBatch, RewardError, create
from rewards.commands import cli
from rewards.commands.check_head import prepare
from rewards.serving.server import Limits, listen
from waiting import HANG, python

SCRIPT = Path(__file__).parents[2] / "scripts" / "heads.py"


def test_the_old_name_of_the_script_says_the_new_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = SCRIPT.with_name("rewards.py")
    monkeypatch.setattr(sys, "argv", [str(old), "check", "sharpness"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(old), run_name="__main__")
    printed = capsys.readouterr()
    assert ended.value.code == 0
    assert "scripts/rewards.py is now called scripts/heads.py" in printed.err
    assert "sharpness" in printed.out


def test_serve_in_a_process_of_its_own() -> None:
    options = json.dumps({"sharpness": None, "prompt_colour": {"share": 0.5}})
    command = [python(), str(SCRIPT), "serve", "--port", "0", "--options", options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            lines = []
            while not lines or "Serving" not in lines[-1]:
                lines.append(process.stdout.readline())
                assert lines[-1], lines
            url = re.search(r"http://\S+", lines[-1]).group()
            head = create("remote", url=url, remote_name="prompt_colour")
            head.load()
            images = torch.from_numpy(np.random.default_rng(0).random((3, 3, 16, 16))).float()
            batch = RewardBatch(prompts=["red", "nothing", "a blue cat"], images=images)
            local = create("prompt_colour", share=0.5)(batch)
            # The same head in another process, maybe with more threads: some roundings of 6e-8.
            torch.testing.assert_close(head(batch), local, rtol=1e-6, atol=0, equal_nan=True)
            assert head.unit == create("prompt_colour").unit
            with pytest.raises(RewardError, match="Served: sharpness, prompt_colour"):
                create("remote", url=url, remote_name="ocr").load()
            process.send_signal(signal.SIGTERM)
            assert process.wait(HANG) == 0
            assert process.stdout.read() == "Stopped.\n"
        finally:
            process.kill()
    assert lines[0] == "[1/2] loading sharpness ...\n"
    assert re.fullmatch(r"\[1/2\] sharpness: \d+\.\d s, digest \w{12}\n", lines[1])


def test_a_signal_whose_exception_is_lost_ends_the_server_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a callback of an import, whose exceptions Python ignores."""

    def prepared(*given: Any) -> Any:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        return prepare(*given)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "prepare", prepared)
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: pytest.fail("it serves"))
    cli.serve({"sharpness": {}}, host="127.0.0.1", port=0, token="", limits=Limits())
    assert capsys.readouterr().out.endswith("Stopped.\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_head_that_cannot_load_stops_the_server(heads_command: HeadsCommand) -> None:
    options = json.dumps({"remote": {"url": "http://localhost:1", "remote_name": "x"}})
    status, printed, error = heads_command("serve", "--port", "0", "--options", options)
    assert status == 1
    assert "[1/1] loading remote" in printed
    pairs = ("--option", "url=http://localhost:1", "--option", "remote_name=x")
    assert error == heads_command("check", "remote", *pairs)[2]  # the same words
    assert "Serving" not in printed


def test_a_port_that_is_taken_is_told_before_loading(heads_command: HeadsCommand) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        status, printed, error = heads_command("serve", "--heads", "sharpness", "--port", port)
    assert status == 2
    assert "in use" in error
    assert "loading" not in printed


def test_a_server_without_its_packages_is_told_before_loading(
    heads_command: HeadsCommand, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    status, printed, error = heads_command("serve", "--heads", "sharpness", "--port", 0)
    assert status == 2
    assert 'needs uvicorn. Install with: pip install "moa-diffusion[server]"' in error
    assert "loading" not in printed
