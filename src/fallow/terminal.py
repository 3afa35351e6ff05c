"""What the commands show: answers and tables on stdout, progress and notes on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

_CONTROLS = dict.fromkeys(code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t")
_FILE_COLUMNS = 200  # of a table in a file or a pipe, where nothing limits it

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how much is done, and how much there is in all, where that is known."""


def console(*, stderr: bool = False) -> Console:
    """A rich console; on stderr unless the text is the command's result."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _FILE_COLUMNS
    return Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False, width=width)


def note(text: str) -> None:
    """One line beside the result, on stderr, dimmed where the terminal can."""
    from rich.text import Text

    console(stderr=True).print(Text(text, style="dim"))


def print_json(value: object) -> None:
    """One JSON object on stdout, in one line; numbers that JSON cannot hold become null."""
    print(json.dumps(_finite(value), allow_nan=False), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def print_fields(fields: Mapping[str, object]) -> None:
    """Names and values in two columns on stdout."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields.items():
        table.add_row(name.replace("_", " "), _cell(value))
    console().print(table)


def print_table(columns: Mapping[str, Literal["left", "right"]], rows: Iterable[Sequence[object]]) -> None:
    """An empty line, then rows under the names of their columns, each justified as it says, on stdout."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name, justify in columns.items():
        table.add_column(name, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, row))
    shown = console()
    shown.print()
    shown.print(table)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


@contextmanager
def progress(*, unit: str) -> Iterator[Progress]:
    """A bar on stderr while the block runs; nothing where stderr is not a terminal.

    ``unit`` is ``"bytes"`` for sizes, else a word in the plural.
    """
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    amount = (DownloadColumn(),) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))
    shown = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())
    with Bar(*columns, console=shown, transient=True, disable=not shown.is_terminal) as bar:
        task = bar.add_task("", total=None, visible=False)
        yield lambda what, done, total: bar.update(
            task, description=what.capitalize(), completed=done, total=total, visible=True
        )


@contextmanager
def spinner(description: str) -> Iterator[None]:
    """A sign of life on stderr for work whose length is not known; nothing where stderr is not a terminal."""
    shown = console(stderr=True)
    if not shown.is_terminal:
        yield
        return
    with shown.status(description):
        yield


def write_text(text: str) -> None:
    """A piece of a model's answer, at once. On a terminal its control characters are left out: they could act there."""
    if sys.stdout.isatty():
        text = text.translate(_CONTROLS)
    sys.stdout.write(text)
    sys.stdout.flush()
