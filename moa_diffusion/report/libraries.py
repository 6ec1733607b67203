"""The libraries that results are written with, looked for before anything is computed."""

from __future__ import annotations

import importlib

TABLES_AND_PLOTS = ("matplotlib", "moocore", "plotly", "pyarrow")  # what an evaluation needs
PLOTS = ("matplotlib", "moocore")  # what a comparison needs


def check_libraries(names: tuple[str, ...]) -> None:
    """Check that libraries are installed.

    Args:
        names: The import names, all of the extra ``report``.

    Raises:
        ImportError: With the line that installs them.
    """
    try:
        for name in names:
            importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'{error}. Try: pip install "moa-diffusion[report]"') from error
