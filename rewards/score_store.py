"""Scores on disk by what was scored: a failure loses none, and none is computed twice."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAIT = 600.0  # seconds for another process that is writing to the same file


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a head says of one sample."""

    value: float  # NaN: does not apply
    extra: Mapping[str, Any]  # further columns


class ScoreStore:
    """The scores of one head, in an SQLite file.

    Args:
        path: The file, which is made with the first scores.
        scorer: What scores, as JSON can hold it: the head with its options and weights.
    """

    def __init__(self, path: Path, scorer: Any) -> None:
        self.path = path
        self._scorer = json.dumps(scorer, sort_keys=True)

    def read(self) -> dict[str, Score]:
        """Return all scores by key; none if there is no file yet.

        Raises:
            ValueError: If the file is damaged, or holds the scores of another head.
        """
        if not self.path.is_file():
            return {}
        try:
            with self._open() as database:
                ((scorer,),) = database.execute("SELECT text FROM scorer").fetchall()
                rows = database.execute("SELECT key, value, extra FROM scores").fetchall()
            scores = {
                key: Score(value=math.nan if value is None else value, extra=json.loads(extra))
                for key, value, extra in rows
            }
        except (sqlite3.DatabaseError, ValueError) as error:
            raise ValueError(
                f"`{self.path}` holds no scores that can be read ({error}). Delete it, and they "
                "are computed anew."
            ) from error
        if scorer != self._scorer:
            raise ValueError(
                f"`{self.path}` holds scores of another head, of other options or weights. Delete "
                "it, or name another place."
            )
        return scores

    def add(self, scores: Mapping[str, Score]) -> None:
        """Add scores by key; all are on disk when this returns, or none.

        Raises:
            OSError: If they cannot be written.
        """
        rows = [
            (
                key,
                None if math.isnan(score.value) else score.value,
                json.dumps(dict(score.extra), ensure_ascii=False, allow_nan=False),
            )
            for key, score in scores.items()
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._open() as database:
                database.execute("CREATE TABLE IF NOT EXISTS scorer (text PRIMARY KEY)")
                database.execute("INSERT OR IGNORE INTO scorer VALUES (?)", (self._scorer,))
                database.execute(
                    "CREATE TABLE IF NOT EXISTS scores (key PRIMARY KEY, value REAL, extra TEXT)"
                )
                database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", rows)
        except sqlite3.OperationalError as error:
            raise OSError(f"`{self.path}` cannot be written: {error}") from error

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Within the block all is one transaction."""
        with closing(sqlite3.connect(self.path, timeout=WAIT)) as database, database:
            database.execute("BEGIN IMMEDIATE")
            yield database
