"""From a command line to a run and an exit status: what the training scripts share."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from moa_diffusion import config
from moa_diffusion.config import Config
from moa_diffusion.loop import Interrupted, Loop
from moa_diffusion.scoring import RewardError
from moa_diffusion.stepper import TrainingError
from moa_diffusion.types import ConfigError


def launch(make: Callable[[Config], Loop]) -> int:
    """Read the command line, make the run, and run it.

    Args:
        make: a run from its configuration.

    Returns:
        exit status: 0 (also after SIGTERM), 1 a failed run, 2 bad input.
    """
    main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if main_process else logging.ERROR,
        format="%(levelname)s %(name)s: %(message)s",
    )
    try:
        run = make(config.parse())
    except (ConfigError, ImportError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once per node: a file may lack on one
            print(f"error: {error}", file=sys.stderr)
        return 2
    # Of these all processes know; after any other error the others may be waiting for this one,
    # and leaving the group in good order would wait for them.
    try:
        run.run()
    except Interrupted as stop:
        print(" ".join([str(stop), *error_notes(stop)]), file=sys.stderr)
    except (RewardError, TrainingError) as error:
        print("\n".join([f"error: {error}", *error_notes(error)]), file=sys.stderr)
        run.close()
        return 1
    run.close()
    return 0


def error_notes(error: BaseException) -> list[str]:
    """What was added to an error on its way."""
    return list(error.__notes__) if "__notes__" in vars(error) else []
