"""Say what a run needs and how long it takes, without weights, network or GPU.

python scripts/plan.py --config configs/sd35_medium_apex.yaml --gpus 8 --card h100
"""

from __future__ import annotations

import sys


def main() -> int:
    """Print the plan; return 2 for bad input."""
    from moa_diffusion.planning.command import plan

    return plan(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
