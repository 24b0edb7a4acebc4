"""Where jobs end: Celery's Redis backend, in which a job's first terminal state is its last.

A job can run twice at once: its worker was frozen for longer than the visibility timeout, or cut off, and another one
took it. Celery's own backend checks and then writes, keeps a success only, and so lets two runs tell two stories. This
one decides and writes in one step in Redis. Producers keep Celery's plain backend: keys and contents are the same.

What the later run leaves undone: its state, its part of a chord, its errbacks, the failure of its chain, and, where it
finds out in time (`end_of`), its links. What stays twice at the worst: the links of two runs that end within the
milliseconds between that look and the writing. Errbacks are called once at most: Celery stores a failure before it
calls them, and a worker killed in between takes them along.

A task id may be used again, for another task or other arguments. Each record holds a digest of what was asked: a run
that begins with another one is a new submission, and the old end is forgotten in the same step; with the same digest it
is a run of the same job. Records without a digest (of older workers, and those that Celery writes for the rest of a
failed chain) count as the same job's. To run the same job once more under its id, let its end be forgotten first:
`tasks.failed.forget`.

Two submissions may be in flight under one id. The record belongs to the one that was taken from the queue last, which
workers may start first: so it holds the time of the take, too. The other one runs as well, with its links, its chord,
its errbacks and its callback; only its states are not stored. A retry is a part of its submission, and never takes the
record over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from celery import states
from celery.backends.redis import RedisBackend, SentinelBackend
from redis.exceptions import RedisError, ResponseError

from tasks.availability import is_away
from tasks.errors import Internal, JobError
from tasks.payloads import CANCEL_KEY
from tasks.redis_keys import results_prefix
from worker.observability.redaction import without_values
from worker.queue.patience import PatientRedis

logger = logging.getLogger(__name__)


#: What `start` says of a job that its producer took back.
CANCELED = "CANCELED"

#: Says of a run's state that another submission under the same id has begun since.
SUPERSEDED = "SUPERSEDED"

#: In a request's `delivery_info`: when its message was taken, in unix seconds of the broker's clock. Celery sends all
#: headers that are not its own on with a retry, and would send this one.
TAKEN_AT = "taken_at"

#: The record's entries with the digest of what was asked, and with the unix seconds at which it was taken.
ASKED, TAKEN = "idefics_asked", "idefics_taken"
#: The state comes first, these next. That many bytes hold all; the answer behind them may have megabytes.
_HEAD_BYTES = 160
_HEAD = re.compile(rb'\s*{\s*"status"\s*:\s*"(\w+)"(?:\s*,\s*"idefics_asked"\s*:\s*"(\w+)")?')
#: Seconds. A take that is later by more was timed by another clock: the broker's name stood for another server.
_SAME_CLOCK_S = 3_600

#: KEYS: the job's record, its cancellation. ARGV: the record, its seconds to live (0: for ever), `start` or `end` where
#: its state is one, the digest of what was asked or nothing, 1 if a submission begins with it, when it was taken.
#: Answers with the end that is there already, with SUPERSEDED, for a start with CANCELED, or with nil where it has
#: written. What is there of another type than a record is written over. A record that is there word for word is this
#: very call's: the connection was lost before it heard of it. An end that is found by a later submission of the same
#: is that one's, too, from then on.
_STORE = f"""
local head = redis.pcall('GETRANGE', KEYS[1], 0, {_HEAD_BYTES - 1})
if type(head) ~= 'string' then head = '' end
local kept = string.match(head, '^%s*{{%s*"status"%s*:%s*"(%w+)"')
local said = '^%s*{{%s*"status"%s*:%s*"%w+"%s*,%s*"{ASKED}"%s*:%s*"(%w+)"'
local asked = string.match(head, said)
local _, first, taken, last = string.match(head, said .. '%s*,%s*"{TAKEN}"%s*:%s*"()([%d.]+)()"')
local later_by = (tonumber(taken) or 0) - (tonumber(ARGV[6]) or 0)
local is_other = asked and ARGV[4] ~= '' and asked ~= ARGV[4]
local is_known = taken and ARGV[6] ~= '' and math.abs(later_by) < {_SAME_CLOCK_S}
if is_other and (ARGV[5] == '0' or (is_known and later_by > 0)) then
    return '{SUPERSEDED}'
end
if kept == 'SUCCESS' or kept == 'FAILURE' or kept == 'REVOKED' then
    if not is_other then
        local record = redis.call('GET', KEYS[1])
        if record == ARGV[1] then
            return false
        end
        if is_known and later_by < 0 then
            record = string.sub(record, 1, first - 1) .. ARGV[6] .. string.sub(record, last)
            redis.pcall('SET', KEYS[1], record, 'KEEPTTL')
        end
        return kept
    end
    redis.call('DEL', KEYS[1])
end
if ARGV[3] == 'start' and redis.call('EXISTS', KEYS[2]) == 1 then
    return '{CANCELED}'
end
if ARGV[1] == '' then
    return false
end
if ARGV[2] == '0' then
    redis.call('SET', KEYS[1], ARGV[1])
else
    redis.call('SETEX', KEYS[1], ARGV[2], ARGV[1])
end
redis.call('PUBLISH', KEYS[1], ARGV[1])
if ARGV[3] == 'end' then
    redis.call('DEL', KEYS[2])
end
return false
"""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for, as its attribute `asked`. A class of ours: a header of the message cannot forge it."""

    digest: str
    #: A submission begins with what is stored next, rather than goes on: an end of another one is forgotten.
    begins: bool = False
    #: When its message was taken from the queue, in unix seconds of the broker's clock; empty where nobody knows.
    taken: str = ""


def taken_now(message: Any) -> dict[str, float | None]:
    """For the `delivery_info` of a message that is being delivered. None where it was taken by kombu's own channel."""
    return {TAKEN_AT: getattr(message.channel, "taken_at", None)}


def asked_by(request: Any, *, begins: bool = False) -> Asked:
    """What a checked request asks for."""
    taken = (request.delivery_info or {}).get(TAKEN_AT)
    # A retry goes on with what its first run began.
    begins = begins and not request.get("retries")
    digest = digest_of(request.get("task"), request.args, request.kwargs)
    return Asked(digest, begins, f"{taken:.6f}" if isinstance(taken, float) else "")


def is_of_another(record: Mapping[str, Any], digest: str) -> bool:
    """Whether a job's record is that of another submission under its id than of the one with this digest."""
    return record.get(ASKED, "") not in ("", digest) and digest != ""


def digest_of(task: str | None, args: Any, kwargs: Any) -> str:
    """Of what a message asks for. Not of its headers and not of its bytes: Celery's retries write them anew."""
    asked = json.dumps([task, args, kwargs], sort_keys=True, separators=(",", ":"), default=repr)
    return hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()


class _FirstEndWins:
    """Before one of Celery's Redis backends. Not for Redis Cluster: the script names two keys."""

    def _get_client(self) -> type[PatientRedis]:
        """One for all threads. Each with its own would be two hundred connections."""
        return PatientRedis

    def on_task_call(self: Any, producer: Any, task_id: str) -> None:
        """Nothing: no worker waits for the links and retries that it sends. Celery's subscribes to each one's result,
        which Redis would pile up unread."""

    def store_result(
        self: Any, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **_: Any
    ) -> Any:
        """Celery's, except that nothing is written over an end."""
        result = self.encode_result(result, state)
        # Encoded once for all attempts: the script tells by it whether an earlier attempt has written.
        record = self._record(task_id, result, state, traceback, request)
        kept = self._store_record(task_id, record, state, asked_of(request))
        if kept and state in states.READY_STATES:
            self._leave_end(task_id, kept, state, request)
        return result

    def _leave_end(self: Any, task_id: str, kept: str, state: str, request: Any) -> None:
        if kept == SUPERSEDED:
            # Its links, errbacks, chain and chord are its own, and wait for its own end.
            logger.info("Job %s was followed by another one under its id: its %s is not stored.", task_id, state)
            return
        logger.info("Job %s has ended as %s already: this run's %s is dropped.", task_id, kept, state)
        if request is not None:
            # What Celery calls next is the other run's to call.
            request.chain = request.errbacks = None
            if request.chord:
                # That run may have died right then, or have been a revocation, which knows of no chord.
                self.repeat_end(request)
            request.chord = None

    def start(self: Any, request: Any, *, is_stored: bool) -> str | None:
        """Say that a job runs, in one step with a look at whether it should. None if so; else CANCELED or its end."""
        value = {"pid": os.getpid(), "hostname": request.hostname}
        begun = asked_by(request, begins=True)
        request.asked = replace(begun, begins=False)
        record = self._record(request.id, value, states.STARTED, None, request) if is_stored else ""
        kept: str | None = self._store_record(request.id, record, states.STARTED, begun, "start")
        return None if kept == SUPERSEDED else kept

    def _record(self: Any, task_id: str, result: Any, state: str, traceback: Any, request: Any) -> str:
        meta = self._get_result_meta(result=result, state=state, traceback=traceback, request=request)
        # Without the arguments of Celery's extended results: pictures of megabytes, and whoever reads them asks twice.
        asked = asked_of(request)
        said = {name: value for name, value in ((ASKED, asked.digest), (TAKEN, asked.taken)) if value and asked.digest}
        record: str = self.encode(
            {"status": meta["status"], **said, **meta, "task_id": task_id, "args": None, "kwargs": None}
        )
        return record

    def _store_record(self: Any, task_id: str, record: str, state: str, asked: Asked, step: str = "") -> str | None:
        seconds = self.failure_expires if state == states.FAILURE else self.expires
        step = "end" if state in states.READY_STATES else step
        kept: bytes | None = self._store_script(
            keys=[self.get_key_for_task(task_id), self._cancel_prefix + task_id],
            args=[record, seconds or 0, step, asked.digest, int(asked.begins), asked.taken],
            client=self.client,
        )
        return kept.decode() if kept else None

    @cached_property
    def _cancel_prefix(self: Any) -> str:
        return results_prefix(self.app) + CANCEL_KEY

    @cached_property
    def _store_script(self: Any) -> Any:
        return self.client.register_script(_STORE)

    def end_of(self: Any, task_id: str, asked: Asked | None = None) -> str | None:
        """SUCCESS, FAILURE or REVOKED; None for a job that has not ended. Cheap: it does not read the answer.

        The end of another submission than `asked` is none.
        """
        try:
            head = self.client.getrange(self.get_key_for_task(task_id), 0, _HEAD_BYTES - 1)
        except ResponseError as error:
            if is_away(error):
                raise
            # Of another type: no record of a job's.
            head = b""
        found = _HEAD.match(head)
        state = found[1].decode() if found else states.PENDING
        is_other = found and found[2] and asked and asked.digest not in ("", found[2].decode())
        return state if state in states.READY_STATES and not is_other else None

    def mark_as_failure(self: Any, task_id: str, exc: BaseException, *args: Any, **options: Any) -> None:
        """Celery's; whatever went wrong around a job's task, its failure has a code."""
        if options.get("request") is not None and not isinstance(exc, JobError):
            logger.error("Job %s hit a defect; it fails as internal: %s", ascii(task_id), without_values(exc))
            exc = Internal(f"{type(exc).__name__} in the worker: its log has the traceback.")
        super().mark_as_failure(task_id, exc, *args, **options)  # type: ignore[misc]

    def on_chord_part_return(self: Any, request: Any, state: str, result: Any, **options: Any) -> None:
        """Celery's; where it meets a defect, that ends the job's part of the chord and not the job."""
        try:
            super().on_chord_part_return(request, state, result, **options)  # type: ignore[misc]
        except RedisError as error:
            if is_away(error):
                raise
            logger.error("Job %s is left out of its chord %s: %s", ascii(request.id), ascii(request.group), error)

    def repeat_end(self: Any, request: Any) -> None:
        """Do again what follows a job's end, where twice is once: the worker that stored it may have died before.

        A chord counts each job's part once. The states of a chain's later tasks are ends themselves.
        """
        meta = self.get_task_meta(request.id, cache=False)
        if request.chord:
            self.on_chord_part_return(request, meta["status"], meta["result"])
        if meta["status"] == states.FAILURE:
            self._fail_chain(request.chain, meta["result"], meta["traceback"])


def asked_of(request: Any) -> Asked:
    """What a request says that it asks for: nothing where Celery made it up, for the rest of a chain."""
    asked = getattr(request, "asked", None)
    return asked if isinstance(asked, Asked) else Asked("")


class ResultBackend(_FirstEndWins, RedisBackend):  # type: ignore[misc]
    """`worker.queue.result_backend:ResultBackend+redis://...`"""


class SentinelResultBackend(_FirstEndWins, SentinelBackend):  # type: ignore[misc]
    """`worker.queue.result_backend:SentinelResultBackend+sentinel://...`"""
