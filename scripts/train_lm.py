"""Fine-tune a causal language model: ``moa-diffusion train-lm``."""

import sys

from moa_diffusion.train_lm import main

if __name__ == "__main__":
    sys.exit(main())
