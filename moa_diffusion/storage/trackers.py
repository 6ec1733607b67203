"""The trackers of accelerate: what each of them takes is what it is given.

Names and settings are a user's (rewards are called what somebody likes), and every tracker has
rules of its own for them: MLflow refuses ``correlation/a~b`` and takes a second slash for a folder,
SwanLab refuses a dot, several refuse values that are not finite or long texts. What all of them
take is the same for all, so that a run looks the same in each.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from torch import Tensor

from moa_diffusion.files.png import to_image
from moa_diffusion.processes.launcher import make_accelerator

PROJECT = "moa_diffusion"
MAX_NAME = 120  # characters: MLflow's limit is 250, SwanLab's 255, a file system's often 255 bytes
MAX_TEXT = 500  # characters of a setting, which is MLflow's oldest limit
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_UNSAFE_KEY = re.compile(r"[^A-Za-z0-9_.-]+")  # the keys of settings are dotted


class TrackerError(RuntimeError):
    """A tracker failed; the message names it."""


class Names:
    """Gives every name one that all trackers take; different names stay different."""

    def __init__(self) -> None:
        self._given: dict[str, str] = {}
        self._taken: set[str] = set()  # without case, as some file systems see it

    def __call__(self, name: str) -> str:
        """Return ``group/name`` of ASCII letters, digits, ``_`` and ``-``, with at most a slash."""
        return self._unique(name, _metric(name))

    def key(self, name: str) -> str:
        """Return the same of a setting's dotted key; dots stay."""
        return self._unique(name, _safe(name, _UNSAFE_KEY).strip(".") or "_")

    def _unique(self, name: str, fitted: str) -> str:
        if name not in self._given:
            digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
            # Letters that ASCII lacks are lost, so that what is left would not tell names apart.
            if len(fitted) > MAX_NAME or fitted.casefold() in self._taken or not _readable(name):
                fitted = f"{fitted[: MAX_NAME - 9]}-{digest}"
            self._taken.add(fitted.casefold())
            self._given[name] = fitted
        return self._given[name]


class Trackers:
    """Starts trackers, hands them numbers, and names the one that fails. For the main process.

    Args:
        names: The names of accelerate's trackers.
        folder: For those that write files, unless they have a place of their own.
    """

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self.names, self.folder = tuple(dict.fromkeys(names)), folder
        self._started: dict[str, list[GeneralTracker]] = {}
        self._names, self._keys = Names(), Names()

    def start(self, settings: Mapping[str, str | int | float | bool]) -> None:
        """Begin a run in every tracker.

        Args:
            settings: The run's settings by dotted key. Long texts are cut, since
                ``config.yaml`` has them whole.

        Raises:
            TrackerError: Naming the first that cannot begin.
        """
        short = {self._keys.key(key): _shortened(value) for key, value in settings.items()}
        options = {"dvclive": {"dir": str(self.folder / "dvclive"), "save_dvc_exp": False}}
        for name in self.names:
            # One for each: accelerate's own methods do not say which tracker failed.
            accelerator = make_accelerator(name, self.folder)
            try:
                accelerator.init_trackers(PROJECT, config=short, init_kwargs=options)
            except (Exception, SystemExit) as error:
                raise TrackerError(f"{name} could not be started: {_cause(error)}") from error
            self._started[name] = accelerator.trackers

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over the numbers of a round; those that are not finite are left out.

        Raises:
            TrackerError: Naming the tracker that failed.
        """
        finite = {
            self._names(name): float(value)
            for name, value in values.items()
            if math.isfinite(value)
        }
        self._hand(step, lambda tracker: tracker.log(finite, step=step))

    def log_image(self, step: int, name: str, pixels: Tensor) -> None:
        """Hand ``[3, H, W]`` in [0, 1] to TensorBoard and wandb; others take numbers alone.

        Raises:
            TrackerError: Naming the tracker that failed.
        """
        image = numpy.asarray(to_image(pixels))  # [H, W, 3]
        fitted = self._names(name)

        def give(tracker: GeneralTracker) -> None:
            if isinstance(tracker, TensorBoardTracker):
                tracker.log_images({fitted: image[None]}, step, dataformats="NHWC")
            elif isinstance(tracker, WandBTracker):
                tracker.log_images({fitted: [image]}, step)

        self._hand(step, give)

    def _hand(self, step: int, give: Callable[[GeneralTracker], None]) -> None:
        """Call a function with every tracker, and name the one that fails."""
        for name, trackers in self._started.items():
            try:
                for tracker in trackers:
                    give(tracker)
            except (Exception, SystemExit) as error:
                raise TrackerError(
                    f"Tracker {name} failed after {step} rounds: {_cause(error)}. The numbers are "
                    f"in metrics.jsonl; without {name} in log.trackers the run goes on."
                ) from error

    def finish(self) -> None:
        """Let all of them finish writing.

        Raises:
            TrackerError: Naming the first that failed, once all were asked.
        """
        failure: TrackerError | None = None
        for name, trackers in self._started.items():
            try:
                for tracker in trackers:
                    tracker.finish()
            except (Exception, SystemExit) as error:
                failure = failure or TrackerError(f"Tracker {name} did not finish: {_cause(error)}")
                failure.__cause__ = failure.__cause__ or error
        self._started = {}
        if failure is not None:
            raise failure


def _metric(name: str) -> str:
    group, slash, rest = name.partition("/")
    parts = [group, rest] if slash else [group]
    return "/".join(_safe(part, _UNSAFE) or "_" for part in parts)


def _safe(text: str, unsafe: re.Pattern[str]) -> str:
    """Drop accents; turn what is not safe into one ``_``, or into ``-`` between two names."""
    letters = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return unsafe.sub("_", letters.replace("~", "-"))


def _readable(name: str) -> bool:
    """Return whether every letter and digit has one in ASCII."""
    return not any(
        letter.isalnum() and not unicodedata.normalize("NFKD", letter).encode("ascii", "ignore")
        for letter in name
    )


def _shortened(value: str | int | float | bool) -> str | int | float | bool:
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return f"{value[: MAX_TEXT - 3]}..."
    return value


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
