"""`idefics-jobs queue`: waiting jobs, running jobs and workers of a queue."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click
from kombu.exceptions import OperationalError
from redis.exceptions import NoPermissionError, RedisError

from ..errors import IdeficsError
from ..queue_state import QueueReader, QueueState
from .console import away, echo_json, echo_rows, json_option
from .jobs import fail


def queue_state(client: Any) -> QueueState:
    """Read the state of the client's queue. Raises RedisError or OperationalError if Redis is away, or refuses."""
    found = QueueReader(client.app).read(client.queue)
    if client.queue not in found:
        raise NoPermissionError(f"This Redis user may not count the jobs in {client.queue}.")
    return found[client.queue]


@click.command("queue")
@json_option
@click.pass_obj
def show_queue(client: Any, as_json: bool) -> None:
    """Show how many jobs wait, and which workers take them.

    The rows: jobs that wait, in all and for each priority that has some; the age of the oldest; jobs whose time has
    not come (countdown, eta); jobs in flight, those of all queues of this Redis; the workers that take from the queue,
    and their model. What this Redis user may not know is "unknown", in JSON null. The age needs the rights of the
    user worker or exporter, and messages that say when they were sent, as those of our client.

    \b
    idefics-jobs --queue idefics.large queue
    """
    source = client()
    try:
        state = queue_state(source)
    except (RedisError, OperationalError) as error:
        raise away(error) from None
    except IdeficsError as error:
        fail(error)
    if as_json:
        echo_json(asdict(state), on_one_line=True)
    else:
        echo_rows(("queue", state.queue), _rows(state))


def _rows(state: QueueState) -> list[tuple[str, str]]:
    workers = state.workers
    return [
        ("waiting", f"{state.waiting:,}"),
        *((f"waiting, priority {priority}", f"{count:,}") for priority, count in state.by_priority.items() if count),
        *([("oldest waiting", seconds(state.oldest_age_s))] if state.waiting else ()),
        ("due later", number(state.due_later)),
        ("in flight (all queues)", number(state.in_flight)),
        ("workers", "unknown" if workers is None else str(len(workers))),
        *(("worker", name) for name in workers or ()),
        *(("model", id) for id in state.models or ()),
    ]


def number(count: int | None) -> str:
    return "unknown" if count is None else f"{count:,}"


def seconds(age_s: float | None) -> str:
    return "unknown" if age_s is None else f"{age_s:,.1f} s"
