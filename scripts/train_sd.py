"""Fine-tune a Stable Diffusion 3.5 pipeline with LoRA on several rewards at once.

accelerate launch scripts/train_sd.py --config configs/tiny_apex.yaml
"""

from __future__ import annotations

import sys


def main() -> int:
    """Train; return the exit status: see ``launch``."""
    from moa_diffusion.config.command_line import read_command_line

    settings = read_command_line()
    from moa_diffusion import assembly
    from moa_diffusion.training.launch import launch

    return launch(assembly.trainer, settings)


if __name__ == "__main__":
    sys.exit(main())
