"""Fine-tune a Stable Diffusion 3.5 pipeline: ``moa-diffusion train-sd``."""

import sys

from moa_diffusion.train_sd import main

if __name__ == "__main__":
    sys.exit(main())
