"""Fine-tune a Stable Diffusion 3.5 pipeline with LoRA on several rewards at once.

accelerate launch -m moa_diffusion.train_sd --config configs/tiny_apex.yaml

With --dry_run it says what the run needs and how long it takes, as ``moa-diffusion plan`` does.
"""

from __future__ import annotations

import sys

from moa_diffusion.files import program


@program.entry
def main() -> int:
    """Train; return the exit status: see ``launch``."""
    if "--dry_run" in sys.argv:
        from moa_diffusion.commands.plan import plan

        return plan([option for option in sys.argv[1:] if option != "--dry_run"])
    from moa_diffusion.config.command_line import read_command_line

    settings = read_command_line()
    from moa_diffusion import assembly
    from moa_diffusion.training.launch import launch

    return launch(assembly.trainer, settings)


if __name__ == "__main__":
    sys.argv[0] = f"{program.MODULE}.train_sd"  # what its help and its errors call it
    sys.exit(main())
