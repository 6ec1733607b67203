"""From a command line to a run and an exit status: what the training scripts share."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from moa_diffusion import config
from moa_diffusion.config import Config
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


def launch(make: Callable[[Config], Run]) -> int:
    """Read the command line, make the run, and run it.

    Args:
        make: A run from its configuration.

    Returns:
        Exit status: 0 (also after SIGTERM), 1 a failed run, 2 bad input, 128 and the signal's
        number after another signal: 130 for Ctrl-C.
    """
    main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if main_process else logging.ERROR,
        format="%(levelname)s %(name)s: %(message)s",
    )
    try:
        with agreed(AccelerateComm(make_accelerator())):  # a file may lack on one node
            settings = config.parse(_arguments())
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
    print("\n".join([f"error: {error}", *error_notes(error)]), file=sys.stderr)
    # Launchers add a long traceback of their own, below which the reason gets lost.
    if "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        print("(This is the reason; the launcher reports only that it ended.)", file=sys.stderr)


def _arguments() -> list[str]:
    """Return the command line.

    Raises:
        ConfigError: If it is empty, since there is no run without a recipe.
    """
    if len(sys.argv) > 1:
        return sys.argv[1:]
    script = Path(sys.argv[0])
    prefix = "lm_" if script.stem == "train_lm" else ""
    recipes = sorted((script.resolve().parent.parent / "configs").glob(f"{prefix}*.yaml"))
    shown = [os.path.relpath(file) for file in recipes if prefix or not file.stem.startswith("lm_")]
    raise ConfigError(
        f"config: should name a recipe. Try: {script} --config {shown[0] if shown else 'FILE.yaml'}"
        + (f"\nRecipes: {', '.join(shown)}." if shown else "")
        + f"\n{script} --help explains every option."
    )


def _says_all(cause: Exception) -> bool:
    """Return whether the message of a cause says all; any other is shown with its traceback."""
    return isinstance(cause, (StorageError, TrackerError, ConfigError, RewardError, ValueError))
