"""Fine-tune a causal language model with LoRA on several rewards, or on several preferences.

accelerate launch -m moa_diffusion.train_lm --config configs/lm_tiny_pama.yaml
accelerate launch -m moa_diffusion.train_lm --config configs/lm_tiny_mopo.yaml
"""

from __future__ import annotations

import sys

from moa_diffusion.files import program


@program.entry
def main() -> int:
    """Train; return the exit status: see ``launch``."""
    from moa_diffusion.config.command_line import read_command_line

    settings = read_command_line()
    from moa_diffusion import assembly
    from moa_diffusion.training.launch import launch

    return launch(assembly.text_trainer, settings)


if __name__ == "__main__":
    sys.argv[0] = f"{program.MODULE}.train_lm"  # what its help and its errors call it
    sys.exit(main())
