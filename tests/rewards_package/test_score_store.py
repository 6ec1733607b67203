"""Scores on disk: read as they were added, whole or not there, of one head alone."""

from __future__ import annotations

import json
import math
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from rewards.score_store import Score, ScoreStore

SCORES = {
    "a": Score(value=0.1 + 0.2, extra={"text": "\u00e9", "n": [1, None]}),
    "b": Score(value=-math.inf, extra={}),
}


def test_scores_are_read_as_they_were_added(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "new" / "scores.sqlite", {"head": "x", "weights": [1]})
    assert store.read() == {}
    assert not store.path.parent.exists(), "reading makes nothing"
    store.add(SCORES)
    store.add({"c": Score(value=math.nan, extra={})})
    again = ScoreStore(store.path, {"weights": [1], "head": "x"}).read()
    assert math.isnan(again.pop("c").value)
    assert again == SCORES
    store.add({"a": Score(value=2.0, extra={})})
    assert store.read()["a"] == Score(value=2.0, extra={})


def test_scores_of_another_head_are_refused_and_kept(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "scores.sqlite", "one")
    store.add(SCORES)
    before = store.path.read_bytes()
    with pytest.raises(ValueError, match="scores of another head, of other options or weights"):
        ScoreStore(store.path, "two").read()
    assert store.path.read_bytes() == before


@pytest.mark.parametrize("content", [b"not scores", b"", b"SQLite format 3\0 and nothing more"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    store = ScoreStore(tmp_path / "scores.sqlite", "one")
    store.path.write_bytes(content)
    with pytest.raises(ValueError, match=r"scores.sqlite` holds no scores that can be read"):
        store.read()
    assert store.path.read_bytes() == content


def test_what_cannot_be_written_leaves_what_is_there(tmp_path: Path) -> None:
    """The file may have no further page, as on a full disk."""
    store = ScoreStore(tmp_path / "scores.sqlite", "one")
    store.add(SCORES)
    many = {str(i): Score(value=1.0, extra={"text": "x" * 1000}) for i in range(100)}
    connect = sqlite3.connect

    def full(*args: object, **options: object) -> sqlite3.Connection:
        database = connect(*args, **options)  # type: ignore[call-overload]
        database.execute("PRAGMA max_page_count = 10")
        return database

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sqlite3, "connect", full)
        with pytest.raises(OSError, match="cannot be written: database or disk is full"):
            store.add(many)
    assert store.read() == SCORES
    with pytest.raises(ValueError, match="Out of range"):
        store.add({"c": Score(value=1.0, extra={"n": math.nan})})
    assert store.read() == SCORES


def test_a_process_that_is_killed_while_it_writes_leaves_what_was_there(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "scores.sqlite", "one")
    store.add(SCORES)
    code = (
        "import os, pathlib, signal, sys; from rewards.score_store import ScoreStore\n"
        "store = ScoreStore(pathlib.Path(sys.argv[1]), 'one')\n"
        "with store._open() as database:\n"
        "    database.execute('DELETE FROM scores')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, store.path], check=False).returncode == -9
    assert store.read() == SCORES


def test_what_stands_in_the_file_is_plain(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "scores.sqlite", {"head": "x"})
    store.add(SCORES)
    with sqlite3.connect(store.path) as database:
        ((scorer,),) = database.execute("SELECT text FROM scorer").fetchall()
        rows = dict(database.execute("SELECT key, value FROM scores").fetchall())
    database.close()
    assert json.loads(scorer) == {"head": "x"}
    assert rows == {"a": 0.1 + 0.2, "b": -math.inf}
