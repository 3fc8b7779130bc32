"""What a command writes: rich tables on a terminal, Markdown in a pipe, one JSON object with `--json`.

Progress goes to standard error and only to a terminal, so that what is piped is the result and nothing else. Texts,
names and paths of users pass through here: what would steer a terminal is spelt out.
"""

import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..checks import printable
from ..stats import table as markdown_table


class Screen:
    """Where one command writes.

    Args:
        as_json: only `emit` writes then.
    """

    def __init__(self, as_json: bool = False) -> None:
        self._json = as_json
        self._out = Console(highlight=False)  # obeys NO_COLOR and TERM=dumb
        self._progress = Console(stderr=True)

    def say(self, text: str = "", style: str | None = None) -> None:
        """A line or a paragraph; `style` shows on a colour terminal only."""
        if self._json:
            return
        if self._out.is_terminal:
            self._out.print(printable(text), style=style, markup=False)
        else:
            print(printable(text), flush=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
        """A table; on a terminal every column but the first is aligned to the right."""
        if self._json:
            return
        rows = [[_cell(cell) for cell in row] for row in rows]
        if not self._out.is_terminal:
            rows = [[re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in row] for row in rows]  # it would end the cell
            self.say(
                f"{title}\n\n{markdown_table(columns, rows)}\n" if title else f"{markdown_table(columns, rows)}\n"
            )
            return
        drawn = Table(title=title or None, header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        # Figures are never cut; the first column gives way on a narrow terminal.
        widths[0] = max(6, min(widths[0], self._out.width - sum(widths[1:]) - 2 * len(widths)))
        for index, column in enumerate(columns):
            drawn.add_column(column, justify="right" if index else "left", no_wrap=True, width=widths[index])
        for row in rows:
            drawn.add_row(*map(Text, row))  # in brackets stands what users wrote, no markup of ours
        self._out.print(drawn)

    def emit(self, result: dict[str, Any]) -> None:
        """The result of the command as JSON, when that was asked for."""
        if self._json:
            print(json.dumps(_plain(result), indent=2, allow_nan=False), flush=True)

    @contextmanager
    def progress(self, total: float, what: str) -> Iterator["Steps"]:
        """A bar that `Steps.step` moves; silent without a terminal."""
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=self._progress,
            transient=True,
            disable=not self._progress.is_terminal,
        )
        with bar:
            yield Steps(bar, total, what)


def _cell(text: str) -> str:
    return " ".join(printable(text).splitlines()).expandtabs(1)


def _plain(value: Any) -> Any:
    """A value as JSON knows it: figures that are not finite become null, what numpy made becomes plain."""
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


class Steps:
    """A bar in motion: announce what comes next, then say how much of the work it was."""

    def __init__(self, bar: Progress, total: float, what: str) -> None:
        self._bar, self._task = bar, bar.add_task(_cell(what), total=total)

    def now(self, what: str) -> None:
        """Name the step that begins."""
        self._bar.update(self._task, description=_cell(what))

    def done(self, amount: float) -> None:
        """Move the bar."""
        self._bar.advance(self._task, amount)


def fail(message: str) -> None:
    """One line on standard error, whatever the message was."""
    line = " ".join(printable(message).split())
    print(f"hf-sparse-cache: {line}", file=sys.stderr, flush=True)
