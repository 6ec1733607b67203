"""Fine-tune a Stable Diffusion 3.5 pipeline with LoRA on several rewards at once.

accelerate launch scripts/train_sd.py --config configs/tiny_apex.yaml
"""

from __future__ import annotations

import logging
import os
import sys


def main() -> int:
    """Train; returns the exit status: 0 (also after SIGTERM), 1 a failed run, 2 bad input."""
    from moa_diffusion import build, config
    from moa_diffusion.scoring import RewardError
    from moa_diffusion.trainer import Interrupted
    from moa_diffusion.types import ConfigError
    from moa_diffusion.update import TrainingError

    main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if main_process else logging.ERROR,
        format="%(levelname)s %(name)s: %(message)s",
    )
    try:
        trainer = build.trainer(config.parse())
    except (ConfigError, ImportError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once per node: a file may lack on one
            print(f"error: {error}", file=sys.stderr)
        return 2
    # Of these all processes know; after any other error the others may be waiting for this one,
    # and leaving the group in good order would wait for them.
    try:
        trainer.run()
    except Interrupted as stop:
        print(f"{stop} {' '.join(stop.__notes__)}", file=sys.stderr)
    except (RewardError, TrainingError) as error:
        print(f"error: {error}\n{' '.join(error.__notes__)}", file=sys.stderr)
        trainer.close()
        return 1
    trainer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
