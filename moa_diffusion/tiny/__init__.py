"""The embedded defaults: models of full-size architectures, small enough to ship.

``StableDiffusion3Pipeline.from_pretrained(PIPELINE_PATH)`` loads the pipeline, offline. It draws
the two families of prompts, at 64 x 64 pixels; ``scripts/dev/tiny_pipeline/`` describes them and
makes it from nothing. ``AutoModelForCausalLM.from_pretrained(LM_PATH)`` loads a language model,
which writes the letters of ``scripts/dev/tiny_letters/``; ``TRAITS_PATH`` holds classifiers of
them.
"""

from pathlib import Path

PIPELINE_PATH = Path(__file__).parent / "pipeline"
PROMPTS_PATH = Path(__file__).parent / "prompts"
LM_PATH = Path(__file__).parent / "lm"
TRAITS_PATH = Path(__file__).parent / "traits"
PREFERENCES_PATH = Path(__file__).parent / "preferences" / "letters.jsonl"

__all__ = ["LM_PATH", "PIPELINE_PATH", "PREFERENCES_PATH", "PROMPTS_PATH", "TRAITS_PATH"]
