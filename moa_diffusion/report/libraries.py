"""What writes results, looked for before anything is drawn."""

from __future__ import annotations


def check_libraries() -> None:
    """Find out before anything is drawn whether what comes after is installed.

    Raises:
        ImportError: with the line that installs it.
    """
    try:
        import matplotlib  # noqa: F401
        import moocore  # noqa: F401
        import plotly  # noqa: F401
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{error}. Try: pip install "moa-diffusion[report]"') from error
