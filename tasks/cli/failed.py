"""`idefics-jobs failed`: the failed jobs, listed, sent again or dropped.

Also a command of Celery, `celery -A worker.app failed`, where this distribution is installed beside it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import click
from kombu.utils import json as kombu_json

from ..failed import FailedJob, FailedJobs
from ..printable import escaped
from .console import BrokerGroup, CommandError, echo, echo_json, echo_rows, json_line_option, json_option
from .redaction import redacted

_AGE = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)")


@dataclass(frozen=True, slots=True)
class Selection:
    """The jobs that a command applies to: those that pass every filter. Ages in seconds."""

    ids: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    older_than: float | None = None
    newer_than: float | None = None
    details: tuple[str, ...] = ()

    def holds(self, job: FailedJob, now: float) -> bool:
        age = now - job.failed_at
        return (
            (not self.ids or job.id in self.ids)
            and (not self.codes or job.code in self.codes)
            and (not self.details or job.detail in self.details)
            and (not self.tasks or job.task in self.tasks)
            and (self.older_than is None or age > self.older_than)
            and (self.newer_than is None or age < self.newer_than)
        )

    def of(self, jobs: Iterable[FailedJob]) -> Iterator[FailedJob]:
        now = time.time()
        return (job for job in jobs if self.holds(job, now))


_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def age(written: str) -> float:
    """Seconds in `90s`, `15m`, `2h`, `7d`; a bare number is seconds. Raises click.BadParameter."""
    match = _AGE.fullmatch(written)
    if match is None:
        raise click.BadParameter(f"{written!r} is not an age: write 90s, 15m, 2h or 7d.")
    return float(match[1]) * _UNITS[match[2]]


class _Group(BrokerGroup):
    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except LookupError as error:
            raise CommandError(str(error.args[0])) from None
        except RecursionError:
            raise CommandError("The job is nested too deeply to be read: drop it.") from None


@click.group(cls=_Group)
def failed() -> None:
    """Jobs that failed: list them, send them again, drop them."""


#: The filters' options, and the fields of a Selection.
_FILTERS = {
    "code": "codes",
    "detail": "details",
    "task": "tasks",
    "older_than": "older_than",
    "newer_than": "newer_than",
}


def _with_filters(command: Callable[..., None]) -> Callable[..., None]:
    """The filters' options; the command gets a Selection."""

    @functools.wraps(command)
    def run(*args: Any, ids: Any = (), **options: Any) -> None:
        chosen = {field: options.pop(option) for option, field in _FILTERS.items()}
        command(*args, Selection(ids=ids, **chosen), **options)

    for option in (
        click.option("--newer-than", type=age, help="Failed less long ago, as 15m."),
        click.option("--older-than", type=age, help="Failed longer ago, as 2h or 7d."),
        click.option("--task", multiple=True, help="Of this task, as idefics.caption; may be repeated."),
        click.option("--detail", multiple=True, help="With this detail of the code, as http_404; may be repeated."),
        click.option("--code", multiple=True, help="With this error code; may be repeated."),
    ):
        run = option(run)
    return run


@failed.command("ls")
@json_option
@_with_filters
@click.pass_obj
def ls(source: Any, selection: Selection, as_json: bool) -> None:
    """List failed jobs, the oldest first, and count them by code.

    \b
    idefics-jobs failed ls --code image_unreachable --newer-than 2h
    """
    shown = (replace(job, message=redacted(job.message)) for job in selection.of(_jobs(source)))
    if as_json:
        for job in shown:
            echo_json(asdict(job), on_one_line=True)
        return
    counts: Counter[str] = Counter()
    echo_rows(("failed at", "id", "task", "code", "attempts", "host", "message"), _rows(shown, counts), plain=_line)
    by_code = ", ".join(f"{number} {code}" for code, number in counts.most_common())
    echo(f"{counts.total()} failed jobs{': ' if by_code else ''}{by_code}")


@failed.command("show")
@click.argument("id")
@click.option("--reveal", is_flag=True, help="With whole texts, URLs and pictures.")
@json_line_option
@click.pass_obj
def show(source: Any, id: str, reveal: bool, as_json: bool) -> None:
    """Print a failed job with its payload, links and options as JSON, without possible secrets.

    \b
    idefics-jobs failed show 8f14e45f-ceea-4672-a9b5-0a2f9d7c2c1f
    """
    jobs = _jobs(source)
    job = jobs.get(id)
    whole = {**asdict(job), "signature": jobs.signature(id) if job.is_whole else {}}
    if not reveal:
        # Celery's own objects become plain JSON first.
        name, shown = "signature", json.loads(kombu_json.dumps(whole))
        whole = {**redacted({**shown, name: None}), name: redacted(shown[name])}
    echo_json(json.loads(kombu_json.dumps(whole)), on_one_line=as_json)


@failed.command("retry")
@click.argument("ids", nargs=-1)
@click.option("--all", "all_", is_flag=True, help="Every failed job.")
@click.option(
    "--queue",
    show_default="the queue they came from",
    help="Send them to this queue, for example another app's task to its own worker.",
)
@json_option
@_with_filters
@click.pass_obj
def retry(source: Any, selection: Selection, all_: bool, queue: str | None, as_json: bool) -> None:
    """Send failed jobs again, each under its id: links and chains go on.

    Name ids or filters, or --all. A job leaves the list once it is sent.

    \b
    idefics-jobs failed retry --code image_unreachable --newer-than 2h
    """
    jobs = _jobs(source)
    chosen = _chosen(jobs, selection, all_)
    whole = [job for job in chosen if job.is_whole]
    sent = 0
    for job in whole:
        # Another retry or the workers' limits have removed it from the list meanwhile.
        with contextlib.suppress(LookupError):
            jobs.retry(job, queue)
            sent += 1
    left = len(chosen) - len(whole)
    if as_json:
        echo_json({"sent": sent, "left": left}, on_one_line=True)
    else:
        echo(f"{sent} jobs sent again" + (f", {left} left whose payloads were not kept" if left else ""))


@failed.command("drop")
@click.argument("ids", nargs=-1)
@click.option("--all", "all_", is_flag=True, help="Every failed job.")
@json_option
@_with_filters
@click.pass_obj
def drop(source: Any, selection: Selection, all_: bool, as_json: bool) -> None:
    """Remove failed jobs from the list, permanently.

    Name ids or filters, or --all.

    \b
    idefics-jobs failed drop --older-than 7d
    """
    jobs = _jobs(source)
    dropped = sum(map(jobs.drop, _chosen(jobs, selection, all_)))
    if as_json:
        echo_json({"dropped": dropped}, on_one_line=True)
    else:
        echo(f"{dropped} jobs dropped")


def _jobs(source: Any) -> FailedJobs:
    """`source`: Celery's context with its app, or a function that makes our client."""
    try:
        return FailedJobs((source() if callable(source) else source).app)
    except ValueError as error:
        raise click.UsageError(f"{error} With celery: `celery -A worker.app failed`.") from None


def _chosen(jobs: FailedJobs, selection: Selection, all_: bool) -> list[FailedJob]:
    if all_ == (selection != Selection()):
        raise click.UsageError("Say which jobs: ids or filters, or --all.")
    return list(selection.of(map(jobs.get, selection.ids) if selection.ids else jobs))


def _kind(job: FailedJob) -> str:
    return f"{job.code}/{job.detail}" if job.detail else job.code


def _rows(jobs: Iterable[FailedJob], counts: Counter[str]) -> Iterator[tuple[str, ...]]:
    """The jobs' cells in a listing; counts them by code on the way."""
    for job in jobs:
        counts[_kind(job)] += 1
        when = datetime.fromtimestamp(job.failed_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        yield when, job.id, job.task, _kind(job), str(job.attempts), job.host, job.message


def _line(cells: Sequence[str]) -> str:
    when, id, task, kind, attempts, host, message = map(escaped, cells)
    return f"{when} {id} {task} {kind} {attempts}x {host}: {message}"
