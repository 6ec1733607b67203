"""Progress bars: on a terminal a bar that is drawn anew, in a file a plain line now and then."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

LINES = 20  # of a bar in a file, at most: one per 5 % of its steps
SECONDS = 10.0  # from one line to the next, at least
_LINE = "{desc}: {n_fmt} of {total_fmt} [{elapsed}<{remaining}{postfix}]"


def progress_bar(
    items: Sequence[Any] | None = None,
    *,
    title: str,
    total: int | None = None,
    initial: int = 0,
    unit: str = "it",
    leave: bool = True,
    position: int | None = None,
    shown: bool = True,
) -> tqdm[Any]:
    """Make a progress bar on stderr; where that is no terminal, it writes lines.

    There is a line at the start, one at the end, and in between at most one per 5 % of the steps
    and per 10 seconds.

    Args:
        items: What it iterates over; None for a bar that is told of its steps.
        title: What it is called.
        total: The number of its steps; that of the items if None.
        initial: The number of steps done before.
        unit: What a step is called, for the rate on a terminal.
        leave: Whether it stays when it ends; otherwise there are only the lines in between.
        position: Its row on the terminal, where there are several.
        shown: Whether anything is shown at all.

    Raises:
        ValueError: If it has neither items nor a total.
    """
    if total is None:
        if items is None:
            raise ValueError(
                "Parameter `total` should be the number of steps where there are no items. "
                "Found `total = None`."
            )
        total = len(items)
    options: dict[str, Any] = {"desc": title, "total": total, "initial": initial}
    if sys.stderr.isatty():
        if not shown:  # otherwise tqdm's own switch, the variable TQDM_DISABLE, holds
            options["disable"] = True
        return tqdm(items, **options, unit=unit, leave=leave, position=position)
    return _Lines(
        items,
        **options,
        disable=not shown,
        leave=leave,
        miniters=max(1, total / LINES),
        mininterval=SECONDS,
        maxinterval=math.inf,  # after a longer step, tqdm would draw a bar in between
        delay=0 if leave else SECONDS,
        bar_format=_LINE,
    )


class _Lines(tqdm):  # type: ignore[type-arg]  # which only its stubs have
    """Writes a line of its own wherever a bar is drawn anew; nothing is taken back."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write how far it is; a message would be the blank that covers a bar."""
        if msg is None:
            print(str(self).strip(), file=self.fp, flush=True)

    def clear(self, nolock: bool = False) -> None:
        """Do nothing: other output goes between the lines."""

    def close(self) -> None:
        """Write where it ended, unless the last line says so, or it does not stay."""
        if self.leave and not self.disable and self.n > self.last_print_n:
            self.display()
        self.leave = False  # tqdm would write it once more
        super().close()
