"""Fine-tune a causal language model with LoRA on several rewards, or on several preferences.

accelerate launch scripts/train_lm.py --config configs/lm_tiny_pama.yaml
accelerate launch scripts/train_lm.py --config configs/lm_tiny_mopo.yaml
"""

from __future__ import annotations

import sys


def main() -> int:
    """Train; return the exit status: see ``launch``."""
    from moa_diffusion.config.command_line import read_command_line

    settings = read_command_line()
    from moa_diffusion import assembly
    from moa_diffusion.training.launch import launch

    return launch(assembly.text_trainer, settings)


if __name__ == "__main__":
    sys.exit(main())
