"""The failed jobs: workers keep each one whole; this module lists them, sends them again and drops them.

They are in the results' Redis under `idefics:failed`, bounded by number, bytes and age. `idefics-jobs failed`
(tasks/cli/failed.py) is the command for this list.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from celery import Celery, signature
from celery.backends.base import Backend
from celery.backends.redis import RedisBackend
from kombu.utils import json as kombu_json

from .errors import ConfigurationError, InvalidRequest, NotFound
from .protocol import CAMPAIGN, CONTINUES, HIDDEN, QUEUE, RUN, SUBMITTED_AT
from .redis_keys import (
    FAILED,
    FAILED_ABOUT,
    FAILED_BYTES,
    FAILED_INVALID,
    FAILED_SIGNATURES,
    results_prefix,
)
from .routing import is_ours, priority_for

#: Ids by the time of their failure; the same for invalid requests only; two hashes by id; the hashes' size.
KEYS = [key.named() for key in (FAILED, FAILED_INVALID, FAILED_ABOUT, FAILED_SIGNATURES, FAILED_BYTES)]

#: Jobs whose summaries are read at once.
CHUNK = 500

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

#: If the list is full, invalid requests are dropped first, then the oldest. Invalid requests always fail again, and a
#: flood of them must not push out jobs that may succeed.
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

# A job that failed again meanwhile has another time, and stays.
_DROP = f"""{_REMOVE}
local at = redis.call('ZSCORE', times, ARGV[1])
if at and tonumber(at) == tonumber(ARGV[2]) then return remove(ARGV[1]) end
return 0
"""


@dataclass(frozen=True, slots=True)
class FailedBounds:
    """Limits of the list."""

    jobs: int
    bytes: int
    ttl_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedJob:
    """A failed job without its payload. Times are unix seconds."""

    id: str
    task: str
    code: str
    message: str
    #: The worker's node name.
    host: str
    #: Number of runs, retries included.
    attempts: int
    submitted_at: float | None
    failed_at: float
    #: False for a large invalid request: its payload is not kept, since it would fail again.
    is_whole: bool = True
    #: The exact reason, such as `http_404`.
    detail: str | None = None


def _from_json(about: bytes) -> FailedJob:
    """A record, without fields that a newer worker has added."""
    return FailedJob(**{name: value for name, value in json.loads(about).items() if name in _FIELDS})


_FIELDS = {field.name for field in fields(FailedJob)}


class FailedJobs:
    """The list of failed jobs, in the Redis of an app's results."""

    def __init__(self, app: Celery) -> None:
        """Raises ConfigurationError (a ValueError) for an app whose results are not in Redis."""
        if not isinstance(app.backend, RedisBackend):
            raise ConfigurationError(
                "Failed jobs are kept in the results' Redis: give an app that has it as its backend."
            )
        self._app = app
        self._redis: Any = app.backend.client
        self._keys = [results_prefix(app) + key for key in KEYS]

    def keep(self, job: FailedJob, signature: dict[str, Any], bounds: FailedBounds) -> None:
        """Put a job on the list. Raises ValueError for one that is larger than the whole list may be."""
        about = json.dumps(asdict(job)).encode()
        whole = kombu_json.dumps(signature).encode() if job.is_whole else b""
        if len(about) + len(whole) > bounds.bytes:
            raise ValueError(f"it is larger than {bounds.bytes} bytes: raise IDEFICS_FAILED_MAX_BYTES")
        is_invalid = int(job.code == InvalidRequest.code)
        arguments = [job.id, repr(job.failed_at), about, whole, is_invalid, bounds.jobs, bounds.bytes, bounds.ttl_s]
        # The backend waits for a server that restarts.
        self._app.backend.ensure(self._redis.eval, (_KEEP, len(self._keys), *self._keys, *arguments))

    def __iter__(self) -> Iterator[FailedJob]:
        """All failed jobs, the oldest first."""
        ids = [_text(id) for id in self._redis.zrange(self._keys[0], 0, -1)]
        for start in range(0, len(ids), CHUNK):
            for about in self._redis.hmget(self._keys[2], ids[start : start + CHUNK]):
                # None: it has left the list meanwhile.
                if about is not None:
                    yield _from_json(about)

    def get(self, id: str) -> FailedJob:
        """The job with this id. Raises NotFound if it is not on the list."""
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
        """Send a job again under its id, with its links, errbacks and chain. A failed chord stays failed.

        It goes to `queue`; by default to the queue that it came from, or, for an unknown task, to Celery's default
        queue. It leaves the list after it is sent, so that it is never lost; if this process dies in between, it may be
        sent twice.
        """
        again = signature(self.signature(job.id), app=self._app)
        # It must run even if its producer's expiry has passed.
        again.options.pop("expires", None)
        _address(again, queue)
        backend = self._app.backend
        keys = [backend.get_key_for_task(id) for id in _ended_with(again)]
        records = {key: record for key in keys if (record := backend.get(key))}
        # The stored result is final: without this the new one would be dropped.
        forget(backend, again)
        try:
            again.apply_async(serializer="json")
        except BaseException:
            for key, record in records.items():
                backend.set(key, record)
            raise
        self.drop(job)

    def drop(self, job: FailedJob) -> bool:
        """Remove a job from the list. False if it is not there, or has failed again since it was read."""
        return bool(self._redis.eval(_DROP, len(self._keys), *self._keys, job.id, repr(job.failed_at)))


def _address(again: Any, queue: str | None) -> None:
    """Set a signature's queue, priority and headers."""
    options = again.options
    if queue:
        for name in ("exchange", "routing_key"):
            options.pop(name, None)
        options["queue"] = queue
    if not is_ours(again.task):
        # The task's own worker reads a stock worker's priorities.
        options["priority"] = priority_for(again.task, options.get("priority"))
        return
    if not (options.get("queue") or options.get("exchange")):
        options["queue"] = QUEUE
    # The deadline counts from now. Its campaign may be paused or canceled, or has gone on without it.
    gone = (CONTINUES, RUN, CAMPAIGN)
    kept = {name: value for name, value in (options.get("headers") or {}).items() if name not in gone}
    options["headers"] = {**kept, SUBMITTED_AT: time.time()}
    options.update(HIDDEN)


def forget(backend: Backend, signature: Any) -> None:
    """Let a job that has ended run again: delete its result, and those that its failure gave to the rest of its chain.

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


def __getattr__(name: str) -> Any:
    """The command under its former name, `idefics_jobs.failed:failed`."""
    if name == "failed":
        from .cli.failed import failed

        return failed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
