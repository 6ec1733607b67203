"""Write a checkpoint for others: ``moa-diffusion export``."""

import sys

from moa_diffusion.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
