"""The commands' output: tables and colors on a terminal; plain lines or JSON for pipes, files and logs.

Untrusted text is escaped (tasks/printable.py) and never read as rich's markup.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import IO, TYPE_CHECKING, Any

import click
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from ..errors import BrokerUnavailable, from_broker
from ..printable import escaped, escaped_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

#: `--json`: the command's parameter is called `as_json`.
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON: one object a line.")
json_line_option = click.option("--json", "as_json", is_flag=True, help="Print the JSON on one line.")

#: Characters of the longest identifier that a table keeps on one line: a UUID has 36.
_WHOLE_CHARS = 40
_STYLES = {
    "succeeded": "green", "delivered": "green", "running": "cyan", "retrying": "yellow", "canceled": "yellow",
    "failed": "red", "ready": "green", "busy": "cyan", "unhealthy": "red",
    "paused": "yellow", "finished": "green", "stopped": "yellow", "silent": "red",
}  # fmt: skip
#: The columns whose cells have a style.
_STYLED = ("status", "state")


def is_terminal(stream: IO[Any]) -> bool:
    """Whether a person reads the output: a terminal with a cursor, unless NO_COLOR is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def terminal(*, err: bool = False) -> Console | None:
    """A console for standard output or standard error if it is a terminal; None for plain text."""
    stream = sys.stderr if err else sys.stdout
    if not is_terminal(stream):
        return None
    # Imported only when it is used: that takes a tenth of a second, and Celery loads `failed` in each of its processes.
    from rich.console import Console

    return Console(file=stream, force_terminal=True, markup=False, emoji=False, highlight=False)


def echo(text: str, *, err: bool = False) -> None:
    """Print one line of text, escaped."""
    click.echo(escaped(text), err=err)


def echo_json(value: Any, *, on_one_line: bool = False, err: bool = False) -> None:
    """Print JSON, over several lines for people or on one for programs."""
    click.echo(escaped_json(json.dumps(value, indent=None if on_one_line else 2, ensure_ascii=False)), err=err)


def tabbed(cells: Sequence[str]) -> str:
    """A row as plain text."""
    return "\t".join(map(escaped, cells))


def echo_rows(
    columns: Sequence[str], rows: Iterable[Sequence[str]], plain: Callable[[Sequence[str]], str] = tabbed
) -> None:
    """Print rows: a table on a terminal; otherwise a line for each by `plain`, without the columns' names."""
    console = terminal()
    if console is None:
        for row in rows:
            click.echo(plain(row))
        return
    console.print(table(columns, rows, console.width))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], width: int) -> Table:
    """Rows as a table for a terminal with `width` columns."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    cells = [[escaped(cell) for cell in row] for row in rows]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(columns):
        longest = max((len(row[number]) for row in cells), default=0)
        is_whole = name == "id" and longest <= min(_WHOLE_CHARS, width // 2)
        table.add_column(name, overflow="fold", no_wrap=is_whole)
    for row in cells:
        # Text, not str: rich would read markup in a string.
        pairs = zip(columns, row, strict=True)
        table.add_row(*(Text(cell, _STYLES.get(cell, "") if name in _STYLED else "") for name, cell in pairs))
    return table


def echo_error(text: str, label: str = "") -> None:
    """Print an error on standard error; its label, such as `Error: ` or a code, is red on a terminal."""
    console = terminal(err=True)
    if console is None:
        echo(f"{label}{text}", err=True)
        return
    from rich.text import Text

    console.print(Text.assemble((escaped(label), "bold red"), escaped(text)), soft_wrap=True)


class CommandError(click.ClickException):
    """Ends a command with exit code 1 and one line on standard error, escaped."""

    def show(self, file: IO[Any] | None = None) -> None:
        echo_error(self.message, "Error: ")


def away(error: Exception) -> CommandError:
    """The error of a command if Redis does not answer or refuses."""
    told = from_broker(error)
    cure = " Name another with --broker or IDEFICS_BROKER_URL." if isinstance(told, BrokerUnavailable) else ""
    return CommandError(f"{told}{cure}")


class BrokerGroup(click.Group):
    """A group whose commands end with one sentence if Redis does not answer or refuses."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (RedisError, OperationalError) as error:
            raise away(error) from None


def duration(seconds: float) -> str:
    """Seconds in two units at most: `3 d 04 h`, `1 h 05 min`, `2 min 30 s` or `12 s`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
