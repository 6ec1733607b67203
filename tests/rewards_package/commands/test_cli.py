"""What the command line says is read: heads, their options, and the token."""

from __future__ import annotations

from pathlib import Path

import pytest
from heads_command import HeadsCommand

from rewards.commands import cli


def test_beyond_loopback_a_token_is_needed(
    heads_command: HeadsCommand, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.delenv(cli.TOKEN_VARIABLE, raising=False)
    for host in ("0.0.0.0", "::", "example.org"):
        status, printed, error = heads_command("serve", "--heads", "sharpness", "--host", host)
        assert status == 2
        assert "the server needs a token" in error
        assert "loading" not in printed
    (tmp_path / "token").write_text(" se cret\n")
    status, _, error = heads_command(
        "serve", "--heads", "sharpness", "--token_file", tmp_path / "token"
    )
    assert "without white space" in error
    (tmp_path / "token").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        cli.read_token(tmp_path / "token")
    with pytest.raises(ValueError, match="cannot be read"):
        cli.read_token(tmp_path / "none")
    monkeypatch.setenv(cli.TOKEN_VARIABLE, "secret")
    assert cli.read_token(None) == "secret"


def test_heads_are_chosen_from_a_training_config(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("rewards:\n  text: {head: ocr, weight: 2.0, workers: 1}\n  sharpness:\n")
    everything = {"text": {"head": "ocr", "weight": 2.0, "workers": 1}, "sharpness": {}}
    assert cli.chosen_heads(None, config, None) == everything
    assert cli.chosen_heads("sharpness, ocr", config, None) == {"sharpness": {}, "ocr": {}}
    assert cli.chosen_heads("ocr", None, '{"ocr": {"workers": 1}}') == {"ocr": {"workers": 1}}
    for arguments, reason in (
        ((None, None, None), "Name the heads"),
        (("ocr,ocr", None, None), "each once"),
        (("ocr", None, "{"), "should be JSON"),
        (("ocr", None, '{"ocr": 3}'), "should read"),
        (("ocr", None, '{"sharpness": {}}'), "not served: sharpness"),
        (("ocr", tmp_path / "none.yaml", None), "cannot be read"),
    ):
        with pytest.raises(ValueError, match=reason):
            cli.chosen_heads(*arguments)


def test_options_are_json_or_text() -> None:
    parsed = cli.parse_options(["a=1e-3", "b=true", "c=cuda:0", "d=x=y", 'e=["u", "v"]', "f=null"])
    assert parsed == {
        "a": 0.001,
        "b": True,
        "c": "cuda:0",
        "d": "x=y",
        "e": ["u", "v"],
        "f": None,
    }
    with pytest.raises(ValueError, match="key=value"):
        cli.parse_options(["a"])
