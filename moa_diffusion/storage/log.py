"""Named numbers of a run: ``metrics.jsonl``, per-sample scores, and what trackers get.

Every name is ``group/name``; docs/metrics.md explains them all.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moa_diffusion.files.png import save_png
from moa_diffusion.files.writing import append_text, write_text
from moa_diffusion.types import Request, RewardMatrix

if TYPE_CHECKING:
    from moa_diffusion.storage.trackers import Trackers

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
ALARMS = "alarms.jsonl"
REWARDS = "rewards.json"  # what scores depend on


class RunLog:
    """Writes one line per rollout to ``metrics.jsonl`` and one file of scores per rollout.

    Only the main process writes. Resuming cuts everything after the checkpoint off, so that a run
    that was killed leaves the same files as one that was not.

    Args:
        folder: The folder of the run.
        trackers: Get every finite number as well; None for none, and on the other processes.
        main: Whether this process writes.
        scores: Whether per-sample scores are written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        trackers: Trackers | None = None,
        main: bool = True,
        scores: bool = True,
    ) -> None:
        self.folder = folder
        self.path = folder / METRICS
        self._trackers, self._main, self._scores = trackers, main, scores

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line for rollout ``step``, from 1; what is not finite becomes null.

        Raises:
            StorageError: If it cannot be written.
            TrackerError: If a tracker fails; the line is then written.
        """
        if self._main:
            self._append(self.path, {"step": step, **values})
        if self._trackers is not None:
            self._trackers.log(step, values)

    def start_trackers(self, settings: Mapping[str, str | int | float | bool]) -> None:
        """Begin a run in every tracker.

        Args:
            settings: The settings of the run, by dotted key.

        Raises:
            TrackerError: Naming a tracker that cannot begin.
        """
        if self._trackers is not None:
            self._trackers.start(settings)

    def close(self) -> None:
        """Let the trackers finish writing.

        Raises:
            TrackerError: Naming a tracker that fails.
        """
        if self._trackers is not None:
            self._trackers.finish()

    def write_alarm(self, alarm: Mapping[str, Any]) -> None:
        """Append one line to ``alarms.jsonl``, and say it."""
        logger.warning("After %d rollouts: %s", alarm["step"], alarm["message"])
        if self._main:
            self._append(self.folder / ALARMS, alarm)

    def _append(self, path: Path, row: Mapping[str, Any]) -> None:
        """Append one line of JSON; a number that is not finite becomes null."""
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        append_text(path, json.dumps(plain, ensure_ascii=False) + "\n")

    def write_scores(
        self,
        step: int,
        requests: Sequence[Request],
        rewards: RewardMatrix,
        advantage: Tensor,
        texts: Sequence[str] = (),
    ) -> None:
        """Write the N samples of a rollout: prompt, seed, raw rewards and final advantage.

        Args:
            step: Number of rollouts that are finished.
            requests: The N samples' requests.
            rewards: Raw rewards ``[K, N]``.
            advantage: Combined advantages ``[N]``.
            texts: The N texts of a language model.
        """
        if self._main and self._scores:
            columns = {"advantage": advantage} | _reward_columns(rewards.names, rewards.values)
            _write_samples(self.folder / "scores", step, requests, columns, rewards.extra, texts)

    def write_evaluation(
        self,
        step: int,
        requests: Sequence[Request],
        names: Sequence[str],
        values: Tensor,
        extra: Sequence[Mapping[str, Any]],
        texts: Sequence[str] = (),
    ) -> None:
        """Write the M samples of an evaluation: prompt, seed, raw rewards and further columns.

        Args:
            step: Number of rollouts that are finished.
            requests: The M samples' requests.
            names: Names of the K objectives.
            values: Raw rewards ``[K, M]``.
            extra: Further columns of each of the M samples.
            texts: The M texts of a language model.
        """
        if self._main:
            columns = _reward_columns(names, values)
            _write_samples(self.folder / "evaluation", step, requests, columns, extra, texts)

    def write_sheet(self, step: int, sheet: Tensor) -> None:
        """Write a sheet ``[3, H, W]`` of held-out images to ``samples/``, and give it to trackers.

        Raises:
            StorageError: If it cannot be written.
            TrackerError: If a tracker fails; the file is then written.
        """
        if self._main:
            save_png(sheet, self.folder / "samples" / f"step-{step:06d}.png")
        if self._trackers is not None:
            self._trackers.log_image(step, "samples/heldout", sheet)

    def write_heads(self, step: int, heads: Mapping[str, Mapping[str, Any]]) -> None:
        """Note in ``rewards.json`` what scores depend on (weights, digests) after ``step``.

        Args:
            step: Rollouts finished so far.
            heads: The reward heads, by objective.
        """
        if not self._main:
            return
        path = self.folder / REWARDS
        notes = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        before = notes[-1]["heads"] if notes else heads
        for name in heads:
            if before.get(name) != heads[name]:
                logger.warning(
                    "Reward %s is not what it was before the run was interrupted: %s, now %s.",
                    name,
                    before.get(name),
                    heads[name],
                )
        if not notes or before != heads:
            notes.append({"after_step": step, "heads": heads})
            write_text(path, json.dumps(notes, indent=2) + "\n")

    def rewind(self, step: int, *, pending: bool = False) -> None:
        """Forget everything after rollout ``step``; at 0 also the evaluation before the first.

        Args:
            step: The last rollout whose numbers and scores stay.
            pending: Whether its row of numbers is still to be written, and goes as well.
        """
        if not self._main:
            return
        last = step - pending
        for path in (self.path, self.folder / ALARMS):
            if path.exists():
                kept = [row for row in read_metrics(path) if step and row["step"] <= last]
                lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in kept]
                write_text(path, "".join(lines))
        for kind in ("scores", "evaluation"):
            for path in self.folder.glob(f"{kind}/step-*.jsonl"):
                if int(path.stem.removeprefix("step-")) > step:
                    path.unlink()


def _reward_columns(names: Sequence[str], values: Tensor) -> dict[str, Tensor]:
    return {f"reward/{name}": row for name, row in zip(names, values, strict=True)}


def _write_samples(
    folder: Path,
    step: int,
    requests: Sequence[Request],
    columns: Mapping[str, Tensor],
    extra: Sequence[Mapping[str, Any]],
    texts: Sequence[str],
) -> None:
    """Write one line per sample; what is NaN becomes null."""
    lines = []
    for i, request in enumerate(requests):
        row: dict[str, Any] = {
            "step": step,
            "group": request.group,
            "sibling": request.sibling,
            "prompt": request.prompt,
            "seed": request.seed,
        }
        if texts:
            row["text"] = texts[i]
        for name, values in columns.items():
            value = float(values[i])
            row[name] = None if math.isnan(value) else value
        if extra:
            row |= extra[i]
        lines.append(json.dumps(row, ensure_ascii=False))
    write_text(folder / f"step-{step:06d}.jsonl", "\n".join(lines) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a ``metrics.jsonl`` or ``alarms.jsonl``; none if there is no such file.

    A last line that a crash cut off is left out.

    Raises:
        ValueError: If another line is not JSON; the message gives its number.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: A line should be JSON. Found {line!r}.") from error
    return rows
