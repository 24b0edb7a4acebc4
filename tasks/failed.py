"""The failed jobs: workers keep each one whole, here they are listed, sent again or dropped.

They lie in the results' Redis under `idefics:failed`, bounded by number, bytes and age. The command is
`idefics-jobs failed`, and `celery -A worker.app failed` where this distribution is installed beside Celery.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any

import click
from celery import Celery, signature
from celery.backends.base import Backend
from celery.backends.redis import RedisBackend
from kombu.exceptions import OperationalError
from kombu.utils import json as kombu_json
from redis import RedisError

from .errors import ConfigurationError, InvalidRequest, NotFound
from .payloads import HIDDEN, QUEUE, SUBMITTED_AT
from .printable import away, echo, echo_json, escaped
from .redis_keys import (
    FAILED,
    FAILED_ABOUT,
    FAILED_BYTES,
    FAILED_INVALID,
    FAILED_SIGNATURES,
    results_prefix,
)
from .routing import is_ours, priority_for

#: Ids by the time of their failure, those of invalid requests again, two hashes by id, and the hashes' size.
KEYS = [key.named() for key in (FAILED, FAILED_INVALID, FAILED_ABOUT, FAILED_SIGNATURES, FAILED_BYTES)]

#: Jobs whose summaries are read at once.
CHUNK = 500
#: Characters of a text that `show` prints.
SHOWN_CHARS = 200

# Writes that free memory come first: a full server refuses a script whose first write may need more.
_REMOVE = """
local times, invalid, about, signatures, bytes = unpack(KEYS)
local function remove(id)
    local size = redis.call('HSTRLEN', about, id) + redis.call('HSTRLEN', signatures, id)
    if redis.call('ZREM', times, id) == 1 then
        redis.call('ZREM', invalid, id)
        redis.call('HDEL', about, id)
        redis.call('HDEL', signatures, id)
        redis.call('DECRBY', bytes, size)
        return 1
    end
    return 0
end
"""

#: The list is full: the oldest goes, but invalid requests first. They fail as often as they are sent, and a flood of
#: them must not push out what is worth another try.
_KEEP = f"""{_REMOVE}
local id, at, is_invalid = ARGV[1], tonumber(ARGV[2]), ARGV[5] == '1'
local max_jobs, max_bytes, ttl = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
remove(id)
for _, old in ipairs(redis.call('ZRANGEBYSCORE', times, '-inf', at - ttl)) do remove(old) end
redis.call('ZADD', times, ARGV[2], id)
if is_invalid then redis.call('ZADD', invalid, ARGV[2], id) end
redis.call('HSET', about, id, ARGV[3])
redis.call('HSET', signatures, id, ARGV[4])
redis.call('INCRBY', bytes, #ARGV[3] + #ARGV[4])
while redis.call('ZCARD', times) > max_jobs or tonumber(redis.call('GET', bytes)) > max_bytes do
    local old = redis.call('ZRANGE', invalid, 0, 0)[1] or redis.call('ZRANGE', times, 0, 0)[1]
    if not old then break end
    -- One of the keys may have been deleted alone.
    if remove(old) == 0 then redis.call('ZREM', invalid, old) end
end
for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, ttl) end
"""

# A job that failed again meanwhile is another entry: its time is not the one given.
_DROP = f"""{_REMOVE}
local at = redis.call('ZSCORE', times, ARGV[1])
if at and tonumber(at) == tonumber(ARGV[2]) then return remove(ARGV[1]) end
return 0
"""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much is kept."""

    jobs: int
    bytes: int
    ttl_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedJob:
    """What is known of a failed job beside its payload. Times are unix seconds."""

    id: str
    task: str
    code: str
    message: str
    #: The worker's node name.
    host: str
    #: Times that it was run, retries included.
    attempts: int
    submitted_at: float | None
    failed_at: float
    #: False for a large invalid request: its payload is not kept, since it would fail again.
    is_whole: bool = True
    #: What exactly it was, as `http_404`.
    detail: str | None = None


def _from_json(about: bytes) -> FailedJob:
    """A record, without what a newer worker has added to it."""
    return FailedJob(**{name: value for name, value in json.loads(about).items() if name in _FIELDS})


_FIELDS = {field.name for field in fields(FailedJob)}


class FailedJobs:
    """The list, in the Redis with an app's results."""

    def __init__(self, app: Celery) -> None:
        """Raises ConfigurationError (a ValueError) for an app whose results are not in Redis."""
        if not isinstance(app.backend, RedisBackend):
            raise ConfigurationError(
                "Failed jobs are kept in the results' Redis: give an app that has it as its backend."
            )
        self._app = app
        self._redis: Any = app.backend.client
        self._keys = [results_prefix(app) + key for key in KEYS]

    def keep(self, job: FailedJob, signature: dict[str, Any], bounds: Bounds) -> None:
        """Put a job on the list. Raises ValueError for one that is larger than the whole list may be."""
        about = json.dumps(asdict(job)).encode()
        whole = kombu_json.dumps(signature).encode() if job.is_whole else b""
        if len(about) + len(whole) > bounds.bytes:
            raise ValueError(f"it is larger than {bounds.bytes} bytes: raise IDEFICS_FAILED_MAX_BYTES")
        is_invalid = int(job.code == InvalidRequest.code)
        arguments = [job.id, repr(job.failed_at), about, whole, is_invalid, bounds.jobs, bounds.bytes, bounds.ttl_s]
        # Waits for a server that restarts.
        self._app.backend.ensure(self._redis.eval, (_KEEP, len(self._keys), *self._keys, *arguments))

    def __iter__(self) -> Iterator[FailedJob]:
        """All, the oldest first."""
        ids = [_text(id) for id in self._redis.zrange(self._keys[0], 0, -1)]
        for start in range(0, len(ids), CHUNK):
            for about in self._redis.hmget(self._keys[2], ids[start : start + CHUNK]):
                # None: it has gone meanwhile.
                if about is not None:
                    yield _from_json(about)

    def get(self, id: str) -> FailedJob:
        """Raises NotFound for an id that is not on the list."""
        about = self._redis.hget(self._keys[2], id)
        if about is None:
            raise NotFound(f"No failed job {id}: it was dropped, sent again or is too old.")
        return _from_json(about)

    def signature(self, id: str) -> dict[str, Any]:
        """A job's whole Celery signature: payload, options, headers, links, chain. Raises NotFound."""
        whole = self._redis.hget(self._keys[3], id)
        if whole is None:
            raise NotFound(f"No failed job {id}: it was dropped, sent again or is too old.")
        if not whole:
            raise NotFound(f"The payload of {id} was invalid and too large to be kept: its producer has it.")
        return dict(kombu_json.loads(_text(whole)))

    def retry(self, job: FailedJob, queue: str | None = None) -> None:
        """Send a job again under its id: its links, errbacks and chain go on. A failed chord stays failed.

        To `queue`; else to the queue that it came from, and a task that is none of ours to the default queue of
        Celery. It leaves the list once it is sent, so that nothing is lost; who dies in between may have sent it twice.
        """
        again = signature(self.signature(job.id), app=self._app)
        # It is wanted even where its producer's expiry has passed.
        again.options.pop("expires", None)
        _address(again, queue)
        backend = self._app.backend
        keys = [backend.get_key_for_task(id) for id in _ended_with(again)]
        records = {key: record for key in keys if (record := backend.get(key))}
        # A terminal result is final: without this the new one would not count.
        forget(backend, again)
        try:
            again.apply_async(serializer="json")
        except BaseException:
            for key, record in records.items():
                backend.set(key, record)
            raise
        self.drop(job)

    def drop(self, job: FailedJob) -> bool:
        """Take a job off the list. False where it is not there, or has failed once more since it was read."""
        return bool(self._redis.eval(_DROP, len(self._keys), *self._keys, job.id, repr(job.failed_at)))


def _address(again: Any, queue: str | None) -> None:
    """Say where a signature goes, and with what beside its payload."""
    options = again.options
    if queue:
        for name in ("exchange", "routing_key"):
            options.pop(name, None)
        options["queue"] = queue
    if not is_ours(again.task):
        # Its own worker reads a stock one's priorities.
        options["priority"] = priority_for(again.task, options.get("priority"))
        return
    if not (options.get("queue") or options.get("exchange")):
        options["queue"] = QUEUE
    # Its deadline counts from now on.
    options["headers"] = {**(options.get("headers") or {}), SUBMITTED_AT: time.time()}
    options.update(HIDDEN)


def forget(backend: Backend, signature: Any) -> None:
    """Let a job that has ended run again: forget its end, and those that its failure gave to the rest of its chain.

    `signature` is a Celery signature or its dictionary, with its `task_id`; `backend` may be Celery's plain one.
    """
    for id in _ended_with(signature):
        backend.forget(id)


def _ended_with(signature: Any) -> Iterator[str]:
    """The ids of a job and of the rest of its chain."""
    options = signature.get("options") or {}
    for sent in [signature, *(options.get("chain") or [])]:
        while sent:
            id = (sent.get("options") or {}).get("task_id")
            if id:
                yield id
            # A chord's result is its body's.
            sent = (sent.get("kwargs") or {}).get("body") if sent.get("subtask_type") == "chord" else None


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


# What may be shown

_SECRET_NAME = re.compile(r"pass|secret|token|credential|authorization|signature|cookie|api.?key", re.IGNORECASE)
_DATA_URI = re.compile(r"(data:[\w.+/-]+(?:;[\w.+=-]+)*,)(\S*)", re.IGNORECASE)
#: From the `://` on: to look for a scheme before it would take quadratic time in a text of words and dots.
_URL = re.compile(r"://([^\s/@]*@)?([^\s?#]*)([?#]\S*)?")
_AGE = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)")


def redacted(value: Any) -> Any:
    """JSON without what may be a secret: URLs' credentials and queries, pictures' bytes, long texts, telling names."""
    if isinstance(value, dict):
        return {name: _redacted_field(name, content) for name, content in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return _redacted_text(value) if isinstance(value, str) else value


def _redacted_field(name: str, value: Any) -> Any:
    return "****" if isinstance(value, str) and _SECRET_NAME.search(name) else redacted(value)


def _redacted_text(text: str) -> str:
    text = _DATA_URI.sub(lambda match: f"{match[1]}****", text)
    text = _URL.sub(_redacted_url, text)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}... ({len(text)} characters)"


def _redacted_url(match: re.Match[str]) -> str:
    credentials, place, query = match.groups()
    return f"://{'****@' if credentials else ''}{place}{query[0] + '****' if query else ''}"


# The command


@dataclass(frozen=True, slots=True)
class Selection:
    """Which jobs a command means: those that pass every filter. Ages in seconds."""

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
        raise click.BadParameter(f"{written!r} is no age: write 90s, 15m, 2h or 7d.")
    return float(match[1]) * _UNITS[match[2]]


class _Group(click.Group):
    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (RedisError, OperationalError) as error:
            raise away(error) from None
        except LookupError as error:
            raise click.ClickException(escaped(str(error.args[0]))) from None
        except RecursionError:
            raise click.ClickException("The job is nested too deeply to be read: drop it.") from None


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
@click.option("--json", "as_json", is_flag=True, help="A JSON object a line.")
@_with_filters
@click.pass_obj
def ls(source: Any, selection: Selection, as_json: bool) -> None:
    """List failed jobs, the oldest first, and count them by code."""
    counts: Counter[str] = Counter()
    for job in selection.of(_jobs(source)):
        counts[_kind(job)] += 1
        shown = replace(job, message=redacted(job.message))
        echo(json.dumps(asdict(shown)) if as_json else _line(shown))
    if not as_json:
        by_code = ", ".join(f"{number} {code}" for code, number in counts.most_common())
        echo(f"{counts.total()} failed jobs{': ' if by_code else ''}{by_code}")


@failed.command("show")
@click.argument("id")
@click.option("--reveal", is_flag=True, help="With whole texts, URLs and pictures.")
@click.pass_obj
def show(source: Any, id: str, reveal: bool) -> None:
    """Print a failed job with its payload, links and options as JSON, what may be secret left out."""
    jobs = _jobs(source)
    job = jobs.get(id)
    whole = {**asdict(job), "signature": jobs.signature(id) if job.is_whole else {}}
    if not reveal:
        # Celery's own objects become plain JSON first.
        name, shown = "signature", json.loads(kombu_json.dumps(whole))
        whole = {**redacted({**shown, name: None}), name: redacted(shown[name])}
    echo_json(json.loads(kombu_json.dumps(whole)))


@failed.command("retry")
@click.argument("ids", nargs=-1)
@click.option("--all", "all_", is_flag=True, help="Every failed job.")
@click.option("--queue", help="Send them there: a task that is none of ours to its own worker. Default: as they came.")
@_with_filters
@click.pass_obj
def retry(source: Any, selection: Selection, all_: bool, queue: str | None) -> None:
    """Send failed jobs again, each under its id: links and chains go on.

    Name ids or filters, or --all. A job leaves the list once it is sent.
    """
    jobs = _jobs(source)
    chosen = _chosen(jobs, selection, all_)
    whole = [job for job in chosen if job.is_whole]
    sent = 0
    for job in whole:
        # One that meanwhile has left the list, another's retry or the workers' bounds took.
        with contextlib.suppress(LookupError):
            jobs.retry(job, queue)
            sent += 1
    left = len(chosen) - len(whole)
    click.echo(f"{sent} jobs sent again" + (f", {left} left whose payloads were not kept" if left else ""))


@failed.command("drop")
@click.argument("ids", nargs=-1)
@click.option("--all", "all_", is_flag=True, help="Every failed job.")
@_with_filters
@click.pass_obj
def drop(source: Any, selection: Selection, all_: bool) -> None:
    """Take failed jobs off the list, for good.

    Name ids or filters, or --all.
    """
    jobs = _jobs(source)
    dropped = sum(map(jobs.drop, _chosen(jobs, selection, all_)))
    click.echo(f"{dropped} jobs dropped")


def _jobs(source: Any) -> FailedJobs:
    """`source` is celery's context with its app, or what makes our client."""
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


def _line(job: FailedJob) -> str:
    when = datetime.fromtimestamp(job.failed_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return f"{when} {job.id} {job.task} {_kind(job)} {job.attempts}x {job.host}: {job.message}"
