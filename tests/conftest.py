"""What holds for every test: no network, one thread, Ctrl-C works."""

from __future__ import annotations

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported: before any import
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["ACCELERATE_USE_CPU"] = "true"  # what tests compare to the bit is the CPU's
os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the processes that tests start

import torch

torch.set_num_threads(1)
# Shells start background jobs with SIGINT ignored, and what ignores it passes that on.
signal.signal(signal.SIGINT, signal.default_int_handler)
