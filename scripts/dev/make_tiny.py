"""Makes the embedded Stable Diffusion 3.5: ``python scripts/dev/make_tiny.py --output /tmp/tiny``.

On two cores of 2025 the transformer takes 16 minutes, and the autoencoder before it comes on top.
An autoencoder that lies in ``OUTPUT/vae`` is kept: the shipped pipeline was made with that of the
one before it, with which the judges were trained. ``--write_prompts`` writes the prompt lists of
the package again as well.
"""

import argparse
from pathlib import Path


def main() -> None:
    """Read the command line and builds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the pipeline")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae_steps", type=int, default=1800)
    parser.add_argument("--vae_batch", type=int, default=16)
    parser.add_argument("--transformer_steps", type=int, default=3200)
    parser.add_argument("--transformer_batch", type=int, default=64)
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--write_prompts", action="store_true", help="write tiny/prompts again too")
    arguments = vars(parser.parse_args())

    from moa_diffusion.tiny import PROMPTS_PATH
    from tiny_pipeline.build import build
    from tiny_pipeline.scenes import write_prompt_files

    if arguments.pop("write_prompts"):
        write_prompt_files(PROMPTS_PATH)
    build(**arguments)


if __name__ == "__main__":
    main()
