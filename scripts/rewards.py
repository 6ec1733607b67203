"""The old name of `scripts/heads.py`; it goes with the next release."""

import importlib
import runpy
import sys
from pathlib import Path

if __name__ == "rewards":  # a script of this folder asked for the package, and Python looks here
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]
    del sys.modules[__name__]
    importlib.import_module(__name__)  # takes this module's place


def main() -> None:
    """Run the script by its new name."""
    print("note: scripts/rewards.py is now called scripts/heads.py.", file=sys.stderr)
    runpy.run_path(str(Path(__file__).with_name("heads.py")), run_name="__main__")


if __name__ == "__main__":
    main()
