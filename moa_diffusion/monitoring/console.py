"""What a person sees of a run: what begins, how far it is, what evaluations find, how it ended.

On a terminal there are tables and a progress bar, in a file plain lines: one per round, one per
evaluation. The main process alone says anything, and nothing is said twice.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console as Terminal
from rich.table import Table
from rich.text import Text
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from moa_diffusion.monitoring.standing import Standing
from moa_diffusion.statistics.bootstrap import LEVEL

UNIT = "Gains are in spreads of the base within a prompt, intervals over prompts."
# Without the rate of rounds, which leaves more room for rewards.
BAR = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"
Facts = Sequence[tuple[str, str]]  # what something is called, and what it is


class Console:
    """Says what happens in a run.

    Args:
        shown: Whether this process says anything.
        title: What a round is called, in the plural.
        total: The number of rounds of the whole run.
        commands: What may be done after the run, ready to be copied.
    """

    def __init__(
        self, *, shown: bool, title: str, total: int, commands: Sequence[str] = ()
    ) -> None:
        self.shown, self.commands = shown, tuple(commands)
        self._title, self._total = title, total
        self._standings: Sequence[Standing] = ()
        self._weights: dict[str, float] = {}
        self._words = ""
        self._bar: tqdm[Any] | None = None

    @property
    def _tables(self) -> bool:
        return Terminal().is_terminal

    def begin(self, facts: Facts) -> None:
        """Say what begins."""
        if self.shown:
            self._facts(facts)

    @contextmanager
    def rounds(self, *, completed: int, bar: bool) -> Iterator[None]:
        """Show how far the run is within the block; log messages do not tear the bar.

        With a bar there are no lines of rounds, unless they go elsewhere.

        Args:
            completed: The number of rounds finished before.
            bar: Whether there is a progress bar, on stderr.
        """
        if not (self.shown and bar):
            yield
            return
        shown = tqdm(total=self._total, initial=completed, desc=self._title, bar_format=BAR)
        with logging_redirect_tqdm(), shown:
            self._bar = shown
            self._refresh()
            try:
                yield
            finally:
                self._bar = None

    def round(
        self, completed: int, objectives: Sequence[str], metrics: Mapping[str, float], words: str
    ) -> None:
        """Say that a round is finished, and how much each objective counted in it.

        Args:
            completed: The number of rounds finished.
            objectives: Names of the objectives.
            metrics: What the round measured; its seconds and the weights are taken from it.
            words: What the learner adds.
        """
        if not self.shown:
            return
        self._words = words
        self._weights = {
            name: metrics[f"weight/{name}"] for name in objectives if f"weight/{name}" in metrics
        }
        if self._bar is not None:
            self._bar.update()
            self._refresh()
            if self._tables:
                return
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in self._weights.items())
        parts = [f"weights {weights}" if weights else "", words]
        said = "; ".join(filter(None, parts))
        seconds = f"{metrics['seconds/total']:.1f} s"
        begins = f"{completed} of {self._total} {self._title}, {seconds}"
        self._line(f"{begins}: {said}" if said else begins)

    def evaluated(self, completed: int, standings: Sequence[Standing]) -> None:
        """Say what an evaluation found: of each reward base, now and gain.

        Args:
            completed: The number of rounds finished; at 0 there is only the base.
            standings: Where each reward stands.
        """
        self.resume(standings if completed else ())
        if not self.shown:
            return
        when = f"after {completed} {self._title}" if completed else "before training"
        if self._tables:
            self._table(f"Evaluation {when}", standings, gain="gain", only_base=not completed)
            self._refresh()
            return
        found = []
        for one in standings:
            label, base, now, gain = _cells(one, interval=False)
            moved = f" -> {now}, gain {gain}" if completed else ""
            found.append(f"{label} {base}{moved}")
        self._line(f"Evaluation {when}: {'; '.join(found)}")

    def _refresh(self) -> None:
        """Have the bar show gains of the last evaluation, and weights of the last round."""
        if self._bar is None:
            return
        gains = {one.name: _gain(one).replace(" ", "") for one in self._standings if _known(one)}
        parts = []
        for name in dict.fromkeys([*self._weights, *gains]):
            weight = f" w{self._weights[name]:.2f}" if name in self._weights else ""
            parts.append(f"{name} {gains.get(name, '')}".rstrip() + weight)
        self._bar.set_postfix_str(", ".join([*parts, *([self._words] if self._words else [])]))

    def resume(self, standings: Sequence[Standing]) -> None:
        """Take over the last evaluation of a run that goes on."""
        self._standings = standings

    def end(self, said: str, standings: Sequence[Standing], facts: Facts) -> None:
        """Say how the run ended, where everything is, and what may be done with it.

        Args:
            said: The first line.
            standings: Where each reward stands; none without an evaluation.
            facts: What there is beside that: alarms, and what lies where.
        """
        if not self.shown:
            return
        self._line(f"\n{said}")
        if standings:
            gain = f"gain [{LEVEL:.0%} interval]"
            if self._tables:
                self._table("", standings, gain=gain, interval=True)
            else:
                self._columns(standings, gain)
            self._line(UNIT)
        self._facts(facts)
        if self.commands:
            self._line("\n".join(["Next:", *(f"  {command}" for command in self.commands)]))

    # ------------------------------------------------------------------ how it is shown

    def _facts(self, facts: Facts) -> None:
        if not self._tables:
            self._line("\n".join(f"{name}: {text}" for name, text in facts))
            return
        grid = Table.grid(padding=(0, 2))
        for name, text in facts:
            grid.add_row(Text(name, style="bold"), Text(text))
        self._rich(grid)

    def _table(
        self,
        title: str,
        standings: Sequence[Standing],
        *,
        gain: str,
        interval: bool = False,
        only_base: bool = False,
    ) -> None:
        table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
        for column in ("reward", "base", *(() if only_base else ("now", gain))):
            table.add_column(column, justify="left" if column == "reward" else "right")
        for one in standings:
            cells = _cells(one, interval=interval)[: 2 if only_base else 4]
            style = "" if interval or only_base else _style(one)
            table.add_row(*(Text(cell) for cell in cells), style=style)
        self._rich(table)

    def _columns(self, standings: Sequence[Standing], gain: str) -> None:
        """Print a table as plain lines, each column as wide as it has to be."""
        rows = [("reward", "base", "now", gain)]
        rows += [_cells(one, interval=True) for one in standings]
        widths = [max(len(row[k]) for row in rows) for k in range(3)]
        self._line(
            "\n".join(
                "  ".join([row[0].ljust(widths[0]), *(row[k].rjust(widths[k]) for k in (1, 2))])
                + f"  {row[3]}"
                for row in rows
            )
        )

    def _rich(self, table: Table) -> None:
        terminal = Terminal()
        with terminal.capture() as captured:
            terminal.print(table)
        self._line(captured.get().removesuffix("\n"))

    def _line(self, text: str) -> None:
        """Print a text; a character that stdout cannot write is no reason to end a run."""
        encoding = sys.stdout.encoding or "utf-8"
        with tqdm.external_write_mode(file=sys.stdout):
            print(text.encode(encoding, "replace").decode(encoding), flush=True)


def _cells(one: Standing, *, interval: bool) -> tuple[str, str, str, str]:
    gain = _gain(one) if _known(one) else "-"
    if interval and not math.isnan(one.interval.value):
        gain = one.interval.text("+z.2f")
    return _label(one), _number(one.base), _number(one.now), gain


def _label(one: Standing) -> str:
    return one.name if one.trained else f"{one.name} (held out)"


def _known(one: Standing) -> bool:
    """Return whether there is a gain: not with one sample per prompt, which has no spread."""
    return not math.isnan(one.gain)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _gain(one: Standing) -> str:
    """Return the gain with its standard error."""
    error = "" if math.isnan(one.error) else f" ± {one.error:.2f}"
    return f"{one.gain:+z.2f}{error}"


def _style(one: Standing) -> str:
    """Return a colour for a gain or a loss that noise of the prompts does not explain."""
    if not abs(one.gain) > 2 * one.error:
        return ""
    return "green" if one.gain > 0 else "red"
