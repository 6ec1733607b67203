"""From a configuration to a run and an exit status: what the training scripts share."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable

from moa_diffusion.config import Config
from moa_diffusion.config.command_line import launcher_note
from moa_diffusion.distributed import AccelerateComm, ProcessError, agreed, tells
from moa_diffusion.files.writing import StorageError
from moa_diffusion.processes.launcher import make_accelerator
from moa_diffusion.processes.stopping import Interrupted
from moa_diffusion.scoring import RewardError
from moa_diffusion.storage.trackers import TrackerError
from moa_diffusion.training.loop import Run
from moa_diffusion.training.stepper import TrainingError
from moa_diffusion.types import ConfigError

BAD_INPUT = (ConfigError, ImportError)
STOPPED_BY_HAND = 128 + signal.SIGINT


def launch(make: Callable[[Config], Run], settings: Config | ConfigError) -> int:
    """Make the run, and run it.

    Args:
        make: A run from its configuration.
        settings: The configuration, or why this process has none: see ``read_command_line``.

    Returns:
        Exit status: 0 (also after SIGTERM), 1 a failed run, 2 bad input, 128 and the signal's
        number after another signal: 130 for Ctrl-C.
    """
    try:
        with agreed(AccelerateComm(make_accelerator())):
            if isinstance(settings, ConfigError):
                raise settings
        run = make(settings)
    except (*BAD_INPUT, ProcessError, StorageError) as error:
        say(error)
        return status_of(error)
    except KeyboardInterrupt:
        print("Stopped before anything was learned.", file=sys.stderr)
        return STOPPED_BY_HAND
    # Of these all processes know; after any other error the others may be waiting for this one,
    # and leaving the group in good order would wait for them.
    status = 0
    try:
        run.run()
    except Interrupted as stop:
        if tells(stop):
            print(" ".join([str(stop), *error_notes(stop)]), file=sys.stderr)
        status = 0 if stop.number == signal.SIGTERM else 128 + stop.number
    except (*BAD_INPUT, StorageError) as error:  # at the models' first use; of this process alone
        say(error)
        return status_of(error)
    except (RewardError, TrainingError, ProcessError) as error:
        cause = error.__cause__
        if tells(error) and isinstance(cause, Exception) and not _says_all(cause):
            traceback.print_exception(cause)
        say(error)
        status = status_of(error)
    except KeyboardInterrupt:
        print("Stopped at once: what was not saved is lost.", file=sys.stderr)
        return STOPPED_BY_HAND
    try:
        run.close()
    except TrackerError as error:
        say(error)
        return status or 1
    return status


def status_of(error: Exception) -> int:
    """Return the exit status that tells an error of the input, 2, from any other, 1."""
    kinds = {"ConfigError", "ImportError", "ModuleNotFoundError"}  # on another process
    bad = error.kind in kinds if isinstance(error, ProcessError) else isinstance(error, BAD_INPUT)
    return 2 if bad else 1


def error_notes(error: BaseException) -> list[str]:
    """Return what was added to an error on its way."""
    return list(error.__notes__) if "__notes__" in vars(error) else []


def say(error: BaseException) -> None:
    """Print an error with what was added to it, unless another process does (``tells``)."""
    if not tells(error):
        return
    lines = "\n".join([f"error: {error}", *error_notes(error)])
    print(f"{lines}{launcher_note()}", file=sys.stderr)


def _says_all(cause: Exception) -> bool:
    """Return whether the message of a cause says all; any other is shown with its traceback."""
    return isinstance(cause, (StorageError, TrackerError, ConfigError, RewardError, ValueError))
