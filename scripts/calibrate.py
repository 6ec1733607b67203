"""Measure rewards before training: ``moa-diffusion calibrate``."""

import sys

from moa_diffusion.commands.calibrate import main

if __name__ == "__main__":
    sys.exit(main())
