"""`idefics-jobs submit`, `result`, `watch`, `status` and `cancel`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

import click
from celery import states
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from ..errors import IdeficsError, JobError, from_exception
from ..outcomes import Outcome
from ..payloads import PAYLOADS, parse
from ..protocol import DEFAULT_PRIORITY
from ..results import Result
from ..worker_registry import no_worker
from .console import away, echo, echo_error, echo_json, echo_rows, json_line_option, json_option
from .fields import arguments
from .redaction import redacted
from .updates import show_updates
from .waiting import is_unserved, watched

#: `caption` for `idefics.caption`.
TASKS = {name.partition(".")[2]: payload for name, payload in PAYLOADS.items()}

timeout_option = click.option("--timeout", type=float, show_default="no limit", help="Seconds to wait for the result.")


@click.command()
@click.argument("task", type=click.Choice(sorted(TASKS)))
@click.argument("fields", nargs=-1)
@click.option(
    "--priority", type=click.IntRange(0, 9), default=DEFAULT_PRIORITY, show_default=True, help="0 is first, 9 last."
)
@click.option("--wait", is_flag=True, help="Wait for the result and print it.")
@click.option("--stream", is_flag=True, help="Print the text while it is written.")
@timeout_option
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help='Print {"id": ...}, with --wait the result, with --stream each update: on one line.',
)
@click.pass_obj
def submit(
    client: Any,
    task: str,
    fields: tuple[str, ...],
    priority: int,
    wait: bool,
    stream: bool,
    timeout: float | None,
    as_json: bool,
) -> None:
    """Queue a job and print its id, or with --wait its result.

    FIELDS are name=value, name:=JSON, or name=@FILE for a picture. A list's name may be given several times.

    \b
    idefics-jobs submit caption image=@cat.png --wait
    idefics-jobs submit caption image=@cat.png --stream
    idefics-jobs submit answer image=https://example.com/a.jpg question="What is this?"
    idefics-jobs submit classify image=@cat.png labels=animal labels=food --wait
    """
    try:
        asked = arguments(TASKS[task], fields)
        payload = parse(f"idefics.{task}", {**asked, "stream": True} if stream else asked)
    except JobError as error:
        fail(error)
    try:
        source = client()
        job = source.submit(payload, priority=priority)
    except (RedisError, OperationalError) as error:
        raise away(error) from None
    except IdeficsError as error:
        fail(error)
    if stream:
        _print_updates(source, job, timeout, as_json)
    elif wait:
        _print_result(source, job, timeout, as_json)
    elif as_json:
        echo_json({"id": job.id}, on_one_line=True)
    else:
        echo(job.id)


@click.command()
@click.argument("id")
@timeout_option
@json_line_option
@click.pass_obj
def result(client: Any, id: str, timeout: float | None, as_json: bool) -> None:
    """Wait for a job and print its result as JSON.

    For a failed job it exits with 1 and prints the code on standard error.

    \b
    idefics-jobs result 8f14e45f-ceea-4672-a9b5-0a2f9d7c2c1f --timeout 60
    """
    source = client()
    _print_result(source, source.job(id), timeout, as_json)


def _print_result(source: Any, job: Any, timeout: float | None, as_json: bool) -> None:
    with _errors_shown(), watched(source):
        answer: Result = job.result(timeout)
    echo_json(answer.model_dump(mode="json"), on_one_line=as_json)


@click.command()
@click.argument("id")
@timeout_option
@json_option
@click.pass_obj
def watch(client: Any, id: str, timeout: float | None, as_json: bool) -> None:
    """Print a job's text while it is written, and its stages on standard error.

    The text of a job without `stream` comes at its end. For a failed job it exits with 1 and prints the code on
    standard error.

    \b
    idefics-jobs watch 8f14e45f-ceea-4672-a9b5-0a2f9d7c2c1f
    """
    source = client()
    _print_updates(source, source.job(id), timeout, as_json)


def _print_updates(source: Any, job: Any, timeout: float | None, as_json: bool) -> None:
    with _errors_shown(), watched(source):
        show_updates(job, timeout, as_json=as_json)


@contextlib.contextmanager
def _errors_shown() -> Iterator[None]:
    try:
        yield
    except RedisError as error:
        raise away(error) from None
    except (IdeficsError, TimeoutError) as error:
        fail(error)


def fail(error: Exception) -> NoReturn:
    """Print an error with its code on standard error, and exit with 1."""
    echo_error(str(error), f"{error.code}: " if isinstance(error, IdeficsError) else "")
    sys.exit(1)


# Many jobs at once


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job's status. Code, detail and message say why it failed or is retried; the message of a queued job also says
    that no worker takes from its queue."""

    id: str
    #: queued (or unknown: Redis cannot tell), running, retrying, succeeded, failed or canceled.
    status: str
    code: str | None = None
    detail: str | None = None
    message: str | None = None

    @property
    def has_ended(self) -> bool:
        return self.status in ("succeeded", "failed", "canceled")


#: Statuses of the client that have another name here.
_NAMES = {"starting": "queued", "processing": "running"}


def statuses(client: Any, ids: Iterable[str]) -> list[JobStatus]:
    """The statuses of jobs, in the order of their ids, each id once."""
    # Read before their outcomes: a job that ends between the two is shown as ended.
    found = {id: _of_job(client.job(id)) for id in ids}
    ended = client.outcomes(found)
    now = [_of_outcome(id, ended[id]) if id in ended else status for id, status in found.items()]
    return _with_hint(client, now) if any(one.status == "queued" for one in now) else now


def _with_hint(client: Any, found: list[JobStatus]) -> list[JobStatus]:
    """The statuses; those of queued jobs with a message, if no worker takes from the client's queue."""
    try:
        if not is_unserved(client):
            return found
    except (IdeficsError, RedisError, OperationalError):
        # This user may not know.
        return found
    return [replace(one, message=no_worker(client.queue)) if one.status == "queued" else one for one in found]


def _of_job(job: Any) -> JobStatus:
    status = job.status
    if status == "processing" and job.async_result.state == states.RETRY:
        met = job.async_result.result
        return _with_error(job.id, "retrying", from_exception(met) if isinstance(met, BaseException) else None)
    return JobStatus(job.id, _NAMES.get(status, status))


def _of_outcome(id: str, outcome: Outcome) -> JobStatus:
    if isinstance(outcome, Result):
        return JobStatus(id, "succeeded")
    return _with_error(id, "failed", outcome) if isinstance(outcome, JobError) else JobStatus(id, "canceled")


def _with_error(id: str, status: str, error: JobError | None) -> JobStatus:
    if error is None:
        return JobStatus(id, status)
    return JobStatus(id, status, error.code, error.detail, redacted(str(error)))


@click.command()
@click.argument("ids", nargs=-1, required=True)
@json_option
@click.pass_obj
def status(client: Any, ids: tuple[str, ...], as_json: bool) -> None:
    """Print the status of jobs: id, status, code, message.

    The status is queued, running, retrying, succeeded, failed or canceled. An id that was never submitted is also
    "queued". Code and message say why a job failed, why it is retried, or that no worker takes from its queue.

    \b
    idefics-jobs status 8f14e45f-ceea-4672-a9b5-0a2f9d7c2c1f
    """
    found = _asked(client, ids)[1]
    if as_json:
        for one in found:
            echo_json(asdict(one), on_one_line=True)
        return
    echo_rows(
        ("id", "status", "code", "message"), ((one.id, one.status, _kind(one), one.message or "-") for one in found)
    )


def _kind(status: JobStatus) -> str:
    return "/".join(filter(None, (status.code, status.detail))) or "-"


def _asked(client: Any, ids: tuple[str, ...]) -> tuple[Any, list[JobStatus]]:
    """A client, and the jobs' statuses. Raises CommandError if Redis does not answer."""
    source = client()
    try:
        return source, statuses(source, ids)
    except (RedisError, OperationalError) as error:
        raise away(error) from None
    except IdeficsError as error:
        fail(error)


@click.command()
@click.argument("ids", nargs=-1, required=True)
@json_option
@click.pass_obj
def cancel(client: Any, ids: tuple[str, ...], as_json: bool) -> None:
    """Ask the workers to cancel jobs.

    A job that waits does not start; one that runs ends at its next step. One that has already ended is left alone.
    `status` shows when a job is canceled.

    \b
    idefics-jobs cancel 8f14e45f-ceea-4672-a9b5-0a2f9d7c2c1f
    """
    source, found = _asked(client, ids)
    for one in found:
        try:
            if not one.has_ended:
                source.cancel(one.id)
        except (RedisError, OperationalError) as error:
            raise away(error) from None
        if as_json:
            echo_json({"id": one.id, "requested": not one.has_ended, "status": one.status}, on_one_line=True)
        else:
            echo(f"{one.id} {f'has already {_ENDED[one.status]}' if one.has_ended else 'will be canceled'}")


_ENDED = {"succeeded": "succeeded", "failed": "failed", "canceled": "been canceled"}
