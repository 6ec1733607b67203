"""Write a checkpoint, or a soup of several runs, as LoRA weights with a model card.

moa-diffusion export --run runs/tiny_apex --checkpoint latest --output exported
moa-diffusion export --run runs/a --run runs/b --weights 0.25,0.75 --output exported
"""

from __future__ import annotations

import argparse
import sys

from moa_diffusion.files import program
from moa_diffusion.files.paths import expanded as place


@program.entry
def main() -> int:
    """Read, write, print; 0, 1 if it cannot be written or sent, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog=program.name(),
        description=program.described(__doc__, "export"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--run", action="append", required=True, help="folder of training; repeated for a soup")
    add("--checkpoint", default="latest", help="of each run: latest (default) or step-20")
    add("--weights", help="of a soup's runs, comma-separated, which sum to 1")
    add("--ema", action=argparse.BooleanOptionalAction, default=True, help="averaged weights")
    add("--output", type=place, required=True, help="a new folder")
    add("--evaluation", type=place, help="of the command evaluate; RUN/evaluate if that is there")
    add("--push_to_hub", metavar="REPO", help="a repository of the hub that it is sent to as well")
    add("--private", action="store_true", help="make that repository a private one if it is new")
    options = parser.parse_args()

    from moa_diffusion.export.export import export
    from moa_diffusion.export.upload import check_repository, upload
    from moa_diffusion.types import ConfigError

    try:
        if options.push_to_hub is not None:
            check_repository(options.push_to_hub)
        message = export(
            options.run,
            checkpoint=options.checkpoint,
            weights=options.weights,
            ema=options.ema,
            output=options.output,
            evaluation=options.evaluation,
        )
    except (ConfigError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, say: nothing of the output is left
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(message)
    if options.push_to_hub is not None:
        try:
            print(f"Sent: {upload(options.output, options.push_to_hub, private=options.private)}")
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0
