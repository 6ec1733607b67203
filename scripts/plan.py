"""Say what a run needs: ``moa-diffusion plan``."""

import sys

from moa_diffusion.commands.plan import main

if __name__ == "__main__":
    sys.exit(main())
