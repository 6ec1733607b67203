"""Compare methods: ``moa-diffusion compare``."""

import sys

from moa_diffusion.commands.compare import main

if __name__ == "__main__":
    sys.exit(main())
