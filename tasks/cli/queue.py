"""`idefics-jobs queue`: waiting jobs, running jobs and workers of a queue."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import click
from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import NoPermissionError, RedisError

from ..errors import IdeficsError
from ..outbox import connect
from ..redis_keys import DUE, GUIDES_SEPARATOR, OUR_STEPS, SEPARATOR, UNACKED, broker_prefix, list_name, separator
from .console import away, echo_json, echo_rows, json_option
from .jobs import fail


@dataclass(frozen=True, slots=True)
class QueueState:
    """The current state of a queue. None: this Redis user may not know."""

    queue: str
    #: Jobs that are due and that no worker has taken yet.
    waiting: int
    #: The same by priority, 0 to 9.
    by_priority: dict[int, int]
    #: Jobs with a countdown or an eta that a worker has set aside until their time.
    due_later: int | None
    #: Jobs that workers hold, running or prefetched, of all queues of this Redis together.
    in_flight: int | None
    #: Names of the workers that take from the queue.
    workers: list[str] | None
    #: Ids of the models that they serve.
    models: list[str] | None


def queue_state(client: Any) -> QueueState:
    """Read the state of the client's queue. Raises RedisError or OperationalError if Redis is away."""
    by_priority = {priority: client.queued(priority) for priority in OUR_STEPS}
    due_later, in_flight = _held(client.app, client.queue)
    workers, models = _workers(client)
    return QueueState(client.queue, sum(by_priority.values()), by_priority, due_later, in_flight, workers, models)


def _workers(client: Any) -> tuple[list[str] | None, list[str] | None]:
    """Who takes from the queue, and the models that they serve; None for what this user may not know."""
    try:
        return client.workers(), [model.id for model in client.models() if model.queue == client.queue]
    except NoPermissionError:
        return None, None


def _held(app: Celery, queue: str) -> tuple[int | None, int | None]:
    """The numbers of jobs that wait for their time and that are in flight; None where this user may not count."""
    prefix = broker_prefix(app)
    separators = {separator(app), SEPARATOR, GUIDES_SEPARATOR}
    lists = {list_name(queue, priority, sep) for priority in OUR_STEPS for sep in separators}
    with connect(app).pipeline(transaction=False) as pipe:
        pipe.hlen(f"{prefix}{UNACKED.named()}")
        for name in lists:
            pipe.zcard(f"{prefix}{DUE.named(prefix + name)}")
        in_flight, *due = pipe.execute(raise_on_error=False)
    return _total(due), _total([in_flight])


def _total(replies: Iterable[Any]) -> int | None:
    total = 0
    for reply in replies:
        if isinstance(reply, NoPermissionError):
            return None
        if isinstance(reply, Exception):
            raise reply
        total += reply
    return total


@click.command("queue")
@json_option
@click.pass_obj
def show_queue(client: Any, as_json: bool) -> None:
    """Show how many jobs wait, and which workers take them.

    The rows: jobs that wait, in all and for each priority that has some; jobs whose time has not come (countdown,
    eta); jobs in flight, those of all queues of this Redis; the workers that take from the queue, and their model.
    What this Redis user may not know is "unknown", in JSON null.

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
        ("due later", _number(state.due_later)),
        ("in flight (all queues)", _number(state.in_flight)),
        ("workers", "unknown" if workers is None else str(len(workers))),
        *(("worker", name) for name in workers or ()),
        *(("model", id) for id in state.models or ()),
    ]


def _number(count: int | None) -> str:
    return "unknown" if count is None else f"{count:,}"
