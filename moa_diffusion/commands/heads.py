"""Reward heads: which there are, whether they work here, scores of images or texts, a server.

moa-diffusion rewards list
moa-diffusion rewards list ocr
moa-diffusion rewards check ocr --option engine=rapidocr
moa-diffusion rewards score ocr --images images --prompts prompts.txt --output scores.csv
moa-diffusion rewards serve --heads ocr,sharpness --port 8000
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moa_diffusion.files import program
from moa_diffusion.files.paths import expanded as place

LIMITS = ("max_body", "max_batch", "max_pixels", "max_queue")  # of rewards.serving.server.Limits


@program.entry
def main() -> int:
    """Run one command; return 1 if a head cannot be used or fails, 2 if the arguments are wrong."""
    options = _parser().parse_args()

    from rich.console import Console

    from moa_diffusion.data.prompt_files import read_prompts
    from rewards import RewardError
    from rewards.commands import cli, score_folder
    from rewards.commands.check_head import Unusable
    from rewards.serving.server import Limits

    try:
        if options.command == "list":
            console = Console(width=None if sys.stdout.isatty() else 160)
            cli.show_head(console, options.name) if options.name else cli.list_heads(console)
        elif options.command == "check":
            cli.check_head(options.name, cli.parse_options(options.option), texts=options.texts)
        elif options.command == "score":
            prompts = [(prompt.text, prompt.metadata) for prompt in read_prompts(options.prompts)]
            score_folder.refuse_blank_lines(options.prompts)
            given = (options.name, cli.parse_options(options.option), options.images, prompts)
            cli.score_samples(*given, output=options.output, batch_size=options.batch_size)
        else:
            sizes = {name: vars(options)[name] for name in LIMITS}
            limits = Limits(**{name: size for name, size in sizes.items() if size is not None})
            heads = cli.chosen_heads(options.heads, options.config, options.options)
            token = cli.read_token(options.token_file)
            cli.serve(heads, host=options.host, port=options.port, token=token, limits=limits)
    except BrokenPipeError:
        raise  # of stdout: `program.entry` knows what to do
    except (Unusable, RewardError, ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, Unusable | RewardError) else 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program.name(),
        description=program.described(__doc__, "rewards"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listed = commands.add_parser("list", help="a table of all heads, or of one head's options")
    listed.add_argument("name", nargs="?", help="a head, or my_module:my_reward")
    check = commands.add_parser("check", help="load a head and score two samples")
    check.add_argument("--texts", action="store_true", help="have it score texts if it scores both")
    score = commands.add_parser("score", help="score a folder of images, or texts")
    score.add_argument("--images", type=place, help="folder, in natural order; else column `text`")
    score.add_argument("--prompts", type=place, required=True, help="in order, or by column `file`")
    score.add_argument("--output", type=place, default=Path("scores.parquet"), help=".csv, .jsonl")
    score.add_argument("--batch_size", type=int, default=16, help="samples at once")
    for command in (check, score):
        command.add_argument("name", help="a head, or my_module:my_reward")
        command.add_argument("--option", action="append", default=[], metavar="KEY=VALUE")
    serve = commands.add_parser("serve", help="serve heads over HTTP, for the head `remote`")
    serve.add_argument("--heads", help="separated by commas; by default all that have options")
    source = serve.add_mutually_exclusive_group()
    source.add_argument("--config", type=place, help="YAML: {head: {option: value}}")
    source.add_argument("--options", help="the same as JSON")
    serve.add_argument("--host", default="127.0.0.1", help="beyond loopback a token is needed")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    serve.add_argument("--token_file", type=place, help="or the variable MOA_REWARDS_TOKEN")
    for name in LIMITS:
        serve.add_argument(f"--{name}", type=int, help="see rewards.serving.server.Limits")
    return parser
