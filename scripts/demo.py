"""Train with two recipes and plot it: ``moa-diffusion demo``."""

import sys

from moa_diffusion.commands.demo import main

if __name__ == "__main__":
    sys.exit(main())
