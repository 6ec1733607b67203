"""List, check, score with and serve rewards: ``moa-diffusion rewards``."""

import sys

from moa_diffusion.commands.heads import main

if __name__ == "__main__":
    sys.exit(main())
