"""Makes the embedded judges: ``python scripts/dev/make_judges.py --output /tmp/judges``.

Two cores, 8 minutes. ``--examine`` prints how well judges do on scenes that they never learnt.
"""

import argparse
from pathlib import Path


def main() -> None:
    """Read the command line; build, or print the marks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the judges")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clip_steps", type=int, default=600, help="the aesthetic head's too")
    parser.add_argument("--clip_batch", type=int, default=96)
    parser.add_argument("--deqa_steps", type=int, default=2400)
    parser.add_argument("--deqa_batch", type=int, default=64)
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument(
        "--examine", action="store_true", help="examine what is there; build nothing"
    )
    arguments = vars(parser.parse_args())

    from tiny_judges import exam
    from tiny_judges.build import build
    from tiny_judges.data import load_vae

    if arguments.pop("examine"):
        for head, marks in exam.examine(str(arguments["output"]), load_vae()).items():
            print(head, ", ".join(f"{name} {mark:.2f}" for name, mark in marks.items()))
    else:
        build(**arguments)


if __name__ == "__main__":
    main()
