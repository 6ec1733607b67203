"""Make the embedded language model and classifiers: ``scripts/dev/make_text.py --output /tmp/t``.

Ten minutes of one core, less with a second. ``--examine`` prints how well they do on prompts that
they never learnt. ``--write_prompts`` writes the prompt lists of the package again as well,
``--write_preferences`` its preferences, on letters of the model in ``--output``.
"""

import argparse
from pathlib import Path


def main() -> None:
    """Read the command line; build, or print the marks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for `lm` and `traits`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lm_steps", type=int, default=1000)
    parser.add_argument("--lm_batch", type=int, default=64)
    parser.add_argument("--trait_steps", type=int, default=500)
    parser.add_argument("--trait_batch", type=int, default=64)
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--write_prompts", action="store_true", help="write tiny/prompts again too")
    parser.add_argument(
        "--write_preferences", action="store_true", help="compare letters; build nothing"
    )
    parser.add_argument(
        "--examine", action="store_true", help="examine what is there; build nothing"
    )
    arguments = vars(parser.parse_args())

    from moa_diffusion.tiny import PREFERENCES_PATH, PROMPTS_PATH
    from tiny_letters import exam
    from tiny_letters.build import build
    from tiny_letters.grammar import write_prompt_files
    from tiny_letters.pairs import write_preferences

    if arguments.pop("write_prompts"):
        write_prompt_files(PROMPTS_PATH)
    compare, examine = arguments.pop("write_preferences"), arguments.pop("examine")
    if compare:
        prompts = (PROMPTS_PATH / "letters_train.txt").read_text(encoding="utf-8").splitlines()
        write_preferences(PREFERENCES_PATH, lm=arguments["output"] / "lm", prompts=prompts)
    elif examine:
        lm, traits = (arguments["output"] / name for name in ("lm", "traits"))
        marks = {"lm": exam.writing(lm)} | exam.reading(traits, lm)
        for name, row in marks.items():
            print(name, ", ".join(f"{what} {mark:.3f}" for what, mark in row.items()))
    else:
        build(**arguments)


if __name__ == "__main__":
    main()
