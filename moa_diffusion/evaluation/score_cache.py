"""Scores by sample and by version of the head: only what is new is computed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa_diffusion.data.prompt_files import Prompt
from moa_diffusion.files.digests import file_digest, json_digest
from moa_diffusion.scoring import RewardHead
from moa_diffusion.types import ConfigError
from rewards.functions import FunctionHead
from rewards.identity import Identity
from rewards.score_store import Score, ScoreStore

__all__ = ["HeadVersion", "Score", "ScoreCache"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadVersion:
    """A loaded head as the table of scores names it."""

    identity: Identity
    digest: str  # covers the identity and the head's source file

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


class ScoreCache(ScoreStore):
    """The scores of one version of a head, in a file of its own.

    Args:
        folder: The folder of all files of scores.
        version: The head whose scores these are.
    """

    def __init__(self, folder: Path, version: HeadVersion) -> None:
        name = f"{version.identity.head}-{version.digest[:16]}.sqlite"
        identity = version.identity.model_dump(mode="json")
        super().__init__(folder / name, {"identity": identity, "digest": version.digest})

    @staticmethod
    def key(sample: str, prompt: Prompt) -> str:
        """Return what a score depends on beside the head.

        The prompt's text is part of the sample's key.
        """
        return json_digest([sample, dict(prompt.metadata)])

    def read(self) -> dict[str, Score]:
        """Return all scores by key.

        Raises:
            ConfigError: If the file is damaged.
        """
        try:
            return super().read()
        except ValueError as error:
            raise ConfigError(str(error)) from error
