"""The progress of a long command on standard error: a bar on a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..batch import Batch
from ..printable import escaped
from .batch_files import BatchInput, BatchOutput
from .console import duration, echo, terminal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

#: Seconds between two lines of progress: on a terminal, elsewhere.
LIVE_S, LOGGED_S = 0.5, 10.0


class Display:
    """A bar with a line of text, or a line now and then. Notes may come from other threads."""

    def __init__(self) -> None:
        console = terminal(err=True)
        self._bar = _bar(console) if console else None
        self._task = self._bar.add_task("", total=None) if self._bar else None
        self._told_at = 0.0 if self._bar else time.monotonic()
        self._trouble = ""

    def is_due(self, trouble: str) -> bool:
        """Whether it is time to show the progress: also when the reason to wait changes."""
        now = time.monotonic()
        if now - self._told_at < (LIVE_S if self._bar else LOGGED_S) and trouble == self._trouble:
            return False
        self._told_at, self._trouble = now, trouble
        return True

    def show(self, text: str, done: float, total: float | None) -> None:
        """Show the progress. `total` None: unknown."""
        if self._bar is None or self._task is None:
            echo(text, err=True)
        else:
            self._bar.update(self._task, description=escaped(text), completed=done, total=total)

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


class ProgressDisplay(Display):
    """Shows a batch's progress."""

    def __init__(self, already: int) -> None:
        """`already`: number of lines that earlier runs have answered."""
        super().__init__()
        self._already = already
        self._started = time.monotonic()

    def tell(self, out: BatchOutput, lines: BatchInput, run: Batch) -> None:
        if not self.is_due(run.trouble):
            return
        done, seconds = len(out.done), time.monotonic() - self._started
        rate = (done - self._already) / seconds if seconds else 0.0
        told = progress(done, out.failed, rate, lines.share, run.in_flight)
        told += f"; waiting: {run.trouble}" if run.trouble else ""
        self.show(told, done, (done + run.in_flight) / lines.share if lines.share else None)


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
        told += f", about {duration(left / rate)} left"
    return told
