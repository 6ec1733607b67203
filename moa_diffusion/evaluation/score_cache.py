"""Scores by sample and by version of the head: only what is new is computed."""

from __future__ import annotations

import fcntl
import inspect
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moa_diffusion.data.prompt_files import Prompt
from moa_diffusion.files.digests import file_digest, json_digest
from moa_diffusion.scoring import RewardHead
from moa_diffusion.types import ConfigError
from rewards.functions import FunctionHead
from rewards.identity import Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a head says of one sample."""

    value: float  # NaN: does not apply
    extra: Mapping[str, Any]  # further columns


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadVersion:
    """A loaded head as the table of scores names it."""

    identity: Identity
    digest: str  # of the identity and of the head's source file

    @classmethod
    def of(cls, name: str, head: RewardHead, options: Mapping[str, Any]) -> HeadVersion:
        """Return the version of a head as it is loaded.

        A function of the user's own has no version: its source file stands for one.

        Args:
            name: The name of the objective.
            head: A head after ``load``, when it knows its weights.
            options: The options that it was built with.

        Raises:
            ConfigError: If the head's code is in no file, so that scores cannot be kept apart from
                those of other code.
        """
        identity = Identity.of(name, head, options)
        target: Any = head.function if isinstance(head, FunctionHead) else type(head)
        if not (inspect.isfunction(target) or inspect.isclass(target)):
            target = type(target)
        try:
            source = inspect.getsourcefile(target)
        except TypeError:
            source = None
        if source is None or not Path(source).is_file():
            raise ConfigError(f"rewards.{name}: should be code in a file. Found {target!r}.")
        return cls(
            identity=identity, digest=json_digest([identity.digest, file_digest(Path(source))])
        )


class ScoreCache:
    """The scores of one version of a head: a file of lines, to which whole batches are added.

    A line that a crash left incomplete does not count, and is cut off by the next writer.

    Args:
        folder: The folder of all files of scores.
        version: The head whose scores these are.
    """

    def __init__(self, folder: Path, version: HeadVersion) -> None:
        self.path = folder / f"{version.identity.head}-{version.digest[:16]}.jsonl"
        self.version = version

    @staticmethod
    def key(sample: str, prompt: Prompt) -> str:
        """Return what a score depends on beside the head.

        The prompt's text is part of the sample's key.
        """
        return json_digest([sample, dict(prompt.metadata)])

    def read(self) -> dict[str, Score]:
        """Return all scores by key.

        Raises:
            ConfigError: If a whole line is damaged.
        """
        if not self.path.is_file():
            return {}
        scores = {}
        *lines, _ = self.path.read_bytes().split(b"\n")  # what follows the last line feed is torn
        for number, line in enumerate(lines[1:], start=2):
            try:
                row = json.loads(line)
                value = math.nan if row["value"] is None else float(row["value"])
                scores[row["key"]] = Score(value=value, extra=row["extra"])
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{self.path}:{number}: is damaged ({error!r}). Delete the file, and what "
                    "it is of is scored again."
                ) from error
        return scores

    def add(self, scores: Mapping[str, Score]) -> None:
        """Append scores; all reach the disk, or the file is as it was."""
        lines = []
        for key, score in scores.items():
            value = None if math.isnan(score.value) else score.value
            row = {"key": key, "value": value, "extra": dict(score.extra)}
            lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # another evaluation may share the cache
            file.seek(0)
            end = file.read().rfind(b"\n") + 1
            file.truncate(end)
            if end == 0:
                lines.insert(0, json.dumps(asdict(self.version), ensure_ascii=False))
            try:
                file.write("".join(f"{line}\n" for line in lines).encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
