"""Fine-tune a Stable Diffusion 3.5 pipeline with LoRA on several rewards at once.

accelerate launch scripts/train_sd.py --config configs/tiny_dual_stage.yaml
"""

from __future__ import annotations

import logging
import sys


def main() -> int:
    """Train, and return the exit status: 0 also after SIGTERM, 1 for an error with a message."""
    from moa_diffusion import build, config
    from moa_diffusion.scoring import RewardError
    from moa_diffusion.trainer import Interrupted, TrainingError
    from moa_diffusion.types import ConfigError

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        trainer = build.trainer(config.parse())
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        trainer.run()
    except Interrupted as stop:
        print(f"{stop} {' '.join(stop.__notes__)}", file=sys.stderr)
    except (RewardError, TrainingError) as error:
        print(f"error: {error}\n{' '.join(error.__notes__)}", file=sys.stderr)
        return 1
    finally:
        trainer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
