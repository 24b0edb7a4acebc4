"""A batch's progress on standard error: a bar on a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..batch import Batch
from ..printable import escaped
from .batch_files import BatchInput, BatchOutput
from .console import echo, terminal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

#: Seconds between two lines of progress: on a terminal, elsewhere.
LIVE_S, LOGGED_S = 0.5, 10.0


class ProgressDisplay:
    """Shows a batch's progress. Safe to share between threads."""

    def __init__(self, already: int) -> None:
        """`already`: number of lines that earlier runs have answered."""
        self._already = already
        console = terminal(err=True)
        self._bar = _bar(console) if console else None
        self._task = self._bar.add_task("", total=None) if self._bar else None
        self._started = time.monotonic()
        self._told_at = 0.0 if self._bar else self._started
        self._trouble = ""

    def tell(self, out: BatchOutput, lines: BatchInput, run: Batch) -> None:
        now = time.monotonic()
        if now - self._told_at < (LIVE_S if self._bar else LOGGED_S) and run.trouble == self._trouble:
            return
        self._told_at, self._trouble = now, run.trouble
        done = len(out.done)
        told = progress(done, out.failed, (done - self._already) / (now - self._started), lines.share, run.in_flight)
        told += f"; waiting: {run.trouble}" if run.trouble else ""
        if self._bar is None or self._task is None:
            echo(told, err=True)
            return
        total = (done + run.in_flight) / lines.share if lines.share else None
        self._bar.update(self._task, description=escaped(told), completed=done, total=total)

    def note(self, text: str) -> None:
        """Print a separate line."""
        if self._bar is None:
            echo(text, err=True)
            return
        from rich.text import Text

        self._bar.console.print(Text(escaped(text)), soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _bar(console: Console) -> Bar:
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    bar = Bar(
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold")),
        console=console,
        transient=True,
        refresh_per_second=1 / LIVE_S,
        # The answers may go to standard output.
        redirect_stdout=False,
        redirect_stderr=False,
    )
    bar.start()
    # Shown again, since a second Ctrl-C ends the process at once and would leave the cursor hidden.
    console.show_cursor(True)
    return bar


def progress(done: int, failed: int, rate: float, share: float, in_flight: int) -> str:
    """The line of progress. `share` is the share of the input that has been read, by lines done and in flight."""
    told = f"{done:,} lines done, {failed:,} failed, {in_flight:,} in flight, {rate:,.1f}/s"
    if rate and share:
        left = (done + in_flight) / share - done
        told += f", about {_duration(left / rate)} left"
    return told


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
