"""`idefics-jobs top`: one live screen of queues, workers and failures."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from ..errors import IdeficsError
from ..printable import escaped
from ..queue_state import QueueReader, QueueState
from ..worker_status import FAILURES_S, WorkerStatus
from .console import away, echo, echo_json, echo_rows, json_option, tabbed, table, terminal
from .jobs import fail
from .queue import number, seconds
from .stopping import Stop

if TYPE_CHECKING:
    from rich.console import RenderableType

QUEUE_COLUMNS = ("queue", "waiting", "by priority", "oldest", "due later", "workers")
WORKER_COLUMNS = ("worker", "state", "model", "batch", "jobs", "jobs/s", "tokens/s", "failures")


@dataclass(frozen=True, slots=True)
class Overview:
    """The queues and workers of a Redis at one time."""

    queues: list[QueueState]
    #: By name; None for a worker that says nothing of its work, or may not be asked.
    workers: dict[str, WorkerStatus | None]

    @property
    def in_flight(self) -> int | None:
        return next((state.in_flight for state in self.queues), None)

    @property
    def jobs_per_s(self) -> float:
        return round(sum(status.jobs_per_s for status in self._statuses), 2)

    @property
    def tokens_per_s(self) -> float:
        return round(sum(status.tokens_per_s for status in self._statuses), 1)

    @property
    def failures(self) -> dict[str, int]:
        """Failed jobs of the last FAILURES_S, by error code, the most frequent first."""
        counts: Counter[str] = Counter()
        for status in self._statuses:
            counts.update(status.failures)
        return dict(counts.most_common())

    @property
    def _statuses(self) -> list[WorkerStatus]:
        return [status for status in self.workers.values() if status is not None]


def overview(reader: QueueReader, queue: str) -> Overview:
    """Read the queues of all known models, and `queue`, with their workers. Raises RedisError."""
    queues = list(reader.read(queue, with_known=True).values())
    names = sorted({name for state in queues for name in state.workers or ()})
    statuses = reader.statuses(names)
    return Overview(queues, {name: statuses.get(name) for name in names})


@click.command("top")
@click.option("--once", is_flag=True, help="Print it once and end, as where there is no terminal.")
@click.option("--interval", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Seconds.")
@json_option
@click.pass_obj
def top(client: Any, once: bool, interval: float, as_json: bool) -> None:
    """Show the queues and workers on a live screen, until Ctrl-C.

    For each queue: jobs waiting, in all and by priority, and the age of the oldest. For each worker: its state and
    model, how full its batch is, the jobs that it holds, jobs and tokens a second in the last 30 s. Below: failed jobs
    of the last 5 minutes, by error code.

    What this Redis user may not know is "unknown", in JSON null: for a producer the oldest job, jobs due later and jobs
    in flight; for a monitor the oldest job's age counts from when this command first saw jobs wait.

    \b
    idefics-jobs top --once --json
    """
    source = client()
    try:
        reader, queue = QueueReader(source.app), source.queue
        console = None if once or as_json else terminal()
        if console is not None:
            _show_live(reader, queue, interval, console)
            return
        while True:
            _print(overview(reader, queue), as_json)
            if once or not as_json:
                return
            time.sleep(interval)
    except (RedisError, OperationalError) as error:
        raise away(error) from None
    except IdeficsError as error:
        fail(error)


def _print(found: Overview, as_json: bool) -> None:
    if as_json:
        totals = {name: getattr(found, name) for name in ("in_flight", "jobs_per_s", "tokens_per_s", "failures")}
        echo_json({**asdict(found), **totals}, on_one_line=True)
        return
    echo_rows(QUEUE_COLUMNS, map(_queue_row, found.queues), plain=lambda cells: tabbed(["queue", *cells]))
    workers = (_worker_row(name, status) for name, status in found.workers.items())
    echo_rows(WORKER_COLUMNS, workers, plain=lambda cells: tabbed(["worker", *cells]))
    echo(_totals(found))


def _show_live(reader: QueueReader, queue: str, interval: float, console: Any) -> None:
    """Renew the screen until Ctrl-C. A Redis that is away is shown, and asked again."""
    from rich.live import Live
    from rich.text import Text

    # A KeyboardInterrupt could come while the screen is drawn, or be lost in a destructor.
    with Stop() as stop, Live(console=console, screen=True, auto_refresh=False) as live:
        while not stop.is_asked:
            try:
                live.update(_screen(overview(reader, queue), console.width), refresh=True)
            except RedisError as error:
                live.update(Text(escaped(str(away(error)))), refresh=True)
            stop.sleep(interval)


def _screen(found: Overview, width: int) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    return Group(
        table(QUEUE_COLUMNS, map(_queue_row, found.queues), width),
        table(WORKER_COLUMNS, (_worker_row(name, status) for name, status in found.workers.items()), width),
        Text(escaped(_totals(found))),
    )


def _queue_row(state: QueueState) -> tuple[str, ...]:
    filled = [f"{priority}: {count:,}" for priority, count in state.by_priority.items() if count]
    oldest = seconds(state.oldest_age_s) if state.waiting else "-"
    workers = None if state.workers is None else len(state.workers)
    return state.queue, f"{state.waiting:,}", "  ".join(filled) or "-", oldest, number(state.due_later), number(workers)


def _worker_row(name: str, status: WorkerStatus | None) -> tuple[str, ...]:
    if status is None:
        return name, "unknown", *["-"] * (len(WORKER_COLUMNS) - 2)
    return (
        name,
        status.state,
        status.model,
        f"{status.rows}/{status.max_rows}",
        f"{status.jobs:,}",
        f"{status.jobs_per_s:,.1f}",
        f"{status.tokens_per_s:,.0f}",
        f"{sum(status.failures.values()):,}",
    )


def _totals(found: Overview) -> str:
    failures = ", ".join(f"{count:,} {code}" for code, count in found.failures.items()) or "none"
    return (
        f"in flight: {number(found.in_flight)}; jobs/s: {found.jobs_per_s:,.1f}; tokens/s: {found.tokens_per_s:,.0f}; "
        f"failed in the last {FAILURES_S / 60:.0f} minutes: {failures}"
    )
