"""The embedded default: a Stable Diffusion 3.5 pipeline small enough to ship, and how it was made.

`StableDiffusion3Pipeline.from_pretrained(PIPELINE_PATH)` loads it, offline. It draws the two
families of prompts described in `scenes`, at 64 x 64 pixels. `scripts/make_tiny.py` makes it from
nothing.
"""

from pathlib import Path

PIPELINE_PATH = Path(__file__).parent / "pipeline"
PROMPTS_PATH = Path(__file__).parent / "prompts"
