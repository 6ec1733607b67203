"""Trying a head before it is trained with."""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

from heads_command import HeadsCommand

from rewards.commands.check_head import PROMPT, prepare, try_head


def test_check_scores_the_fitting_image_higher(heads_command: HeadsCommand) -> None:
    status, printed, _ = heads_command("check", "prompt_colour", "--option", "share=0.05")
    assert status == 0
    scores = [float(value) for value in re.findall(r"sample: (\S+)", printed)]
    assert len(scores) == 2
    assert scores[0] > scores[1] + 0.2


def test_the_check_image_can_be_read() -> None:
    assert '"MARBLE"' in PROMPT
    head = prepare("ocr", {"workers": 0})
    assert try_head(head).scores.values.tolist() == [1, 0]
    head.close()


def test_check_scores_texts(heads_command: HeadsCommand, tmp_path: Path) -> None:
    code = "def length(texts, prompts):\n    return [len(text) for text in texts]\n"
    (tmp_path / "mine.py").write_text(code)
    status, printed, _ = heads_command("check", "--texts", f"{tmp_path / 'mine.py'}:length")
    assert status == 0
    assert "fitting sample: 31" in printed


def test_check_says_what_is_wrong(heads_command: HeadsCommand, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        from rewards import RewardHead

        class Absent(RewardHead):
            def load(self):
                raise OSError("no weights")

            def score(self, batch):
                return 1 / 0
        """)
    )
    absent = f"{tmp_path / 'mine.py'}:Absent"
    for arguments, reason in (
        (["sharpnes"], "Did you mean 'sharpness'"),
        (["sharpness", "--option", "x=1"], 'has no option "x"'),
        (["remote", "--option", "url=http://localhost:1", "--option", "remote_name=x"], "Refused"),
        ([absent], "Downloads are forbidden by HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"),
        (["sharpness", "--texts"], "Found a batch of texts"),
    ):
        status, _, error = heads_command("check", *arguments)
        assert status == 1
        assert reason in error
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE")
    assert "name their folder as `model`" in heads_command("check", absent)[2]
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    assert heads_command("check", "sharpness", "--option", "x")[0] == 2


def test_a_missing_package_is_told_with_the_install_line(
    heads_command: HeadsCommand, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        from rewards import RewardHead

        class Needy(RewardHead):
            def __init__(self):
                raise ImportError('Install with: pip install "moa-diffusion[ocr]"')

            def score(self, batch): ...
        """)
    )
    status, _, error = heads_command("check", f"{tmp_path / 'mine.py'}:Needy")
    assert status == 1
    assert 'Install with: pip install "moa-diffusion[ocr]"' in error


def test_whatever_a_constructor_raises_is_told(heads_command: HeadsCommand, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        from rewards import RewardHead

        class Boom(RewardHead):
            def __init__(self):
                raise RuntimeError("cannot")

            def score(self, batch): ...
        """)
    )
    status, _, error = heads_command("check", f"{tmp_path / 'mine.py'}:Boom")
    assert status == 1
    assert "mine.py:Boom\": RuntimeError('cannot')" in error
