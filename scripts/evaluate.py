"""Draw and score checkpoints: ``moa-diffusion evaluate``."""

import sys

from moa_diffusion.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
