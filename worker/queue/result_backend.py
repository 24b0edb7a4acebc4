"""Celery's Redis result backend, in which the first terminal state of a job wins.

A job can run twice at once: its worker froze or was cut off for longer than the visibility timeout, and another worker
took the job. Celery's backend checks before it writes, and protects successes only: two runs can store different
states. This backend checks and writes in one Lua script. Producers keep Celery's plain backend: keys and contents are
the same.

The later run does not store its state, count its part of a chord, call its errbacks or fail its chain. If it learns of
the first terminal state in time (`terminal_state`), it does not send its links either. In the worst case links are sent
twice, by two runs that end within the milliseconds between that check and the write. Errbacks are called at most once:
Celery stores a failure before it calls them, so a worker that is killed in between loses them.

A task id may be used again, for another task or other arguments. Each record holds a digest of the submission, that is
of its task and arguments. A run that begins with another digest is a new submission, and the old terminal state is
deleted in the same step; with the same digest it is a run of the same job. Records without a digest (of older workers,
and those that Celery writes for the rest of a failed chain) count as the same job's. To run a job again under its id,
delete its terminal state first: `tasks.failed.forget`.

Two submissions may be in flight under one id. The record belongs to the one that was taken from the queue last, even if
it starts first: so the record also holds the time of the take. The other one runs too, with its links, chord, errbacks
and callback; only its states are not stored. A retry is a part of its submission, and never takes the record over.
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
from tasks.protocol import CONTINUES
from tasks.redis_keys import CANCELLATION, results_prefix
from worker.observability.job_fields import job_extra
from worker.observability.redaction import log_defect
from worker.queue.redis_retry import RetryingRedis

logger = logging.getLogger(__name__)


#: Returned by `start` for a job that its producer canceled.
CANCELED = "CANCELED"

#: Returned for a state of a submission after which another one under the same id has begun.
SUPERSEDED = "SUPERSEDED"

#: In a request's `delivery_info`: when its message was taken, in unix seconds of the broker's clock. Celery sends all
#: headers that are not its own on with a retry, and would send this one.
TAKEN_AT = "taken_at"

#: Two entries of the record: the digest of task and arguments, and the unix seconds at which the message was taken.
DIGEST, TAKEN = "idefics_asked", "idefics_taken"
#: A record begins with the state, then these. These bytes hold them; the answer behind them may have megabytes.
_HEAD_BYTES = 160
_HEAD = re.compile(rb'\s*{\s*"status"\s*:\s*"(\w+)"(?:\s*,\s*"idefics_asked"\s*:\s*"(\w+)")?')
#: Seconds. Two times that differ by more are from different servers, since the broker's name leads to another one now,
#: and are not compared.
_SAME_CLOCK_S = 3_600

#: KEYS: the job's record, its cancellation. ARGV: the record, its seconds to live (0: for ever), `start` or `end` where
#: its state is one, the digest of task and arguments or nothing, 1 if a submission begins with it, when it was taken.
#: Returns the terminal state that is stored already, SUPERSEDED, for a start CANCELED, or nil where it has written. A
#: value of another type than a record is overwritten. A record that is the same byte for byte was written by this call
#: itself, whose connection was lost before the reply. A later submission of the same job adopts a terminal state that
#: it finds: only the time at which it was taken is updated.
_STORE = f"""
local head = redis.pcall('GETRANGE', KEYS[1], 0, {_HEAD_BYTES - 1})
if type(head) ~= 'string' then head = '' end
local kept = string.match(head, '^%s*{{%s*"status"%s*:%s*"(%w+)"')
local said = '^%s*{{%s*"status"%s*:%s*"%w+"%s*,%s*"{DIGEST}"%s*:%s*"(%w+)"'
local digest = string.match(head, said)
local _, first, taken, last = string.match(head, said .. '%s*,%s*"{TAKEN}"%s*:%s*"()([%d.]+)()"')
local later_by = (tonumber(taken) or 0) - (tonumber(ARGV[6]) or 0)
local is_other = digest and ARGV[4] ~= '' and digest ~= ARGV[4]
local is_comparable = taken and ARGV[6] ~= '' and math.abs(later_by) < {_SAME_CLOCK_S}
if is_other and (ARGV[5] == '0' or (is_comparable and later_by > 0)) then
    return '{SUPERSEDED}'
end
if kept == 'SUCCESS' or kept == 'FAILURE' or kept == 'REVOKED' then
    if not is_other then
        local record = redis.call('GET', KEYS[1])
        if record == ARGV[1] then
            return false
        end
        if is_comparable and later_by < 0 then
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
class Submission:
    """The submission that a request belongs to, as its attribute `submission`. A header cannot forge this class."""

    digest: str
    #: True if the next write begins a submission: it deletes a terminal state of an earlier one.
    begins: bool = False
    #: When its message was taken from the queue, in unix seconds of the broker's clock; empty if unknown.
    taken: str = ""


def taken_now(message: Any) -> dict[str, float | None]:
    """For the `delivery_info` of a message that is being delivered. None where it was taken by kombu's own channel."""
    return {TAKEN_AT: getattr(message.channel, "taken_at", None)}


def taken_text(message: Any) -> str:
    """The same, as text for a record."""
    return _as_text(taken_now(message)[TAKEN_AT])


def submission_of(request: Any, *, begins: bool = False) -> Submission:
    """The submission that a checked request belongs to."""
    # A retry, or a job that a worker sent back, continues the submission that its first run began.
    begins = begins and not request.get("retries") and not request.get(CONTINUES)
    digest = digest_of(request.get("task"), request.args, request.kwargs)
    return Submission(digest, begins, _as_text((request.delivery_info or {}).get(TAKEN_AT)))


def _as_text(taken: Any) -> str:
    return f"{taken:.6f}" if isinstance(taken, float) else ""


def is_of_another(record: Mapping[str, Any], digest: str) -> bool:
    """Whether a job's record belongs to another submission under its id than the one with this digest."""
    return record.get(DIGEST, "") not in ("", digest) and digest != ""


def digest_of(task: str | None, args: Any, kwargs: Any) -> str:
    """Digest of a task and its arguments. Not of headers or bytes: Celery's retries write them anew."""
    job = json.dumps([task, args, kwargs], sort_keys=True, separators=(",", ":"), default=repr)
    return hashlib.blake2b(job.encode(), digest_size=16).hexdigest()


class FirstTerminalStateWins:
    """Mixin for Celery's Redis backends. Not for Redis Cluster: the script names two keys."""

    def _get_client(self) -> type[RetryingRedis]:
        """One client for all threads: one for each thread would open two hundred connections."""
        return RetryingRedis

    def on_task_call(self: Any, producer: Any, task_id: str) -> None:
        """Do nothing: a worker does not wait for the links and retries that it sends.

        Celery's would subscribe to each result, and the messages would never be read.
        """

    def store_result(
        self: Any, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **_: Any
    ) -> Any:
        """Celery's, except that no terminal state is overwritten."""
        result = self.encode_result(result, state)
        # Encoded once for all attempts: the script compares it to learn whether an earlier attempt has written.
        record = self._record(task_id, result, state, traceback, request)
        kept = self._store_record(task_id, record, state, current_submission(request))
        if kept and state in states.READY_STATES:
            self._on_not_stored(task_id, kept, state, request)
        return result

    def _on_not_stored(self: Any, task_id: str, kept: str, state: str, request: Any) -> None:
        job = job_extra(task_id, getattr(request, "task", None))
        if kept == SUPERSEDED:
            # Its own links, errbacks, chain and chord follow its own end.
            logger.info(
                "Job %s was followed by another one under its id: its %s is not stored.", task_id, state, extra=job
            )
            return
        logger.info("Job %s has ended as %s already: this run's %s is dropped.", task_id, kept, state, extra=job)
        if request is not None:
            # The other run calls what follows.
            request.chain = request.errbacks = None
            if request.chord:
                # That run may have died right after it stored its end, or was a revocation, which ignores chords.
                self.replay_side_effects(request)
            request.chord = None

    def start(self: Any, request: Any, *, is_stored: bool) -> str | None:
        """Store that a job runs. Returns CANCELED or its terminal state if it must not run, otherwise None."""
        value = {"pid": os.getpid(), "hostname": request.hostname}
        begun = submission_of(request, begins=True)
        request.submission = replace(begun, begins=False)
        record = self._record(request.id, value, states.STARTED, None, request) if is_stored else ""
        kept: str | None = self._store_record(request.id, record, states.STARTED, begun, "start")
        return None if kept == SUPERSEDED else kept

    def _record(self: Any, task_id: str, result: Any, state: str, traceback: Any, request: Any) -> str:
        meta = self._get_result_meta(result=result, state=state, traceback=traceback, request=request)
        # Without the arguments of Celery's extended results, which may hold megabytes of images.
        submission = current_submission(request)
        said = {
            name: value
            for name, value in ((DIGEST, submission.digest), (TAKEN, submission.taken))
            if value and submission.digest
        }
        record: str = self.encode(
            {"status": meta["status"], **said, **meta, "task_id": task_id, "args": None, "kwargs": None}
        )
        return record

    def _store_record(
        self: Any, task_id: str, record: str, state: str, submission: Submission, step: str = ""
    ) -> str | None:
        seconds = self.failure_expires if state == states.FAILURE else self.expires
        step = "end" if state in states.READY_STATES else step
        kept: bytes | None = self._store_script(
            keys=[self.get_key_for_task(task_id), self._cancel_prefix + task_id],
            args=[record, seconds or 0, step, submission.digest, int(submission.begins), submission.taken],
            client=self.client,
        )
        return kept.decode() if kept else None

    @cached_property
    def _cancel_prefix(self: Any) -> str:
        return results_prefix(self.app) + CANCELLATION.prefix

    @cached_property
    def _store_script(self: Any) -> Any:
        return self.client.register_script(_STORE)

    def terminal_state(self: Any, task_id: str, submission: Submission | None = None) -> str | None:
        """SUCCESS, FAILURE or REVOKED; None if the job has not ended, or only another submission than `submission` has.

        Reads the start of the record, not the answer.
        """
        try:
            head = self.client.getrange(self.get_key_for_task(task_id), 0, _HEAD_BYTES - 1)
        except ResponseError as error:
            if is_away(error):
                raise
            # A value of another type is not a job's record.
            head = b""
        found = _HEAD.match(head)
        state = found[1].decode() if found else states.PENDING
        is_other = found and found[2] and submission and submission.digest not in ("", found[2].decode())
        return state if state in states.READY_STATES and not is_other else None

    def mark_as_failure(self: Any, task_id: str, exc: BaseException, *args: Any, **options: Any) -> None:
        """Celery's. An unexpected exception becomes a JobError with the code `internal`."""
        if options.get("request") is not None and not isinstance(exc, JobError):
            log_defect(logger, exc, task_id, getattr(options["request"], "task", None))
            exc = Internal(f"{type(exc).__name__} in the worker: its log has the traceback.")
        super().mark_as_failure(task_id, exc, *args, **options)  # type: ignore[misc]

    def on_chord_part_return(self: Any, request: Any, state: str, result: Any, **options: Any) -> None:
        """Celery's. An error of the chord's keys ends the job's part of the chord, not the job."""
        try:
            super().on_chord_part_return(request, state, result, **options)  # type: ignore[misc]
        except RedisError as error:
            if is_away(error):
                raise
            job = job_extra(request.id, getattr(request, "task", None))
            logger.error("Job %s is left out of its chord %s: %s", request.id, request.group, error, extra=job)

    def replay_side_effects(self: Any, request: Any) -> None:
        """Repeat what follows a stored terminal state: the worker that stored it may have died before it did that.

        Only what is idempotent: a chord counts each job's part once, and the first terminal state of a chain's later
        tasks wins, too.
        """
        meta = self.get_task_meta(request.id, cache=False)
        if request.chord:
            self.on_chord_part_return(request, meta["status"], meta["result"])
        if meta["status"] == states.FAILURE:
            self._fail_chain(request.chain, meta["result"], meta["traceback"])


def current_submission(request: Any) -> Submission:
    """The submission that a request belongs to; without a digest for one that Celery made for the rest of a chain."""
    submission = getattr(request, "submission", None)
    return submission if isinstance(submission, Submission) else Submission("")


class ResultBackend(FirstTerminalStateWins, RedisBackend):  # type: ignore[misc]
    """`worker.queue.result_backend:ResultBackend+redis://...`"""


class SentinelResultBackend(FirstTerminalStateWins, SentinelBackend):  # type: ignore[misc]
    """`worker.queue.result_backend:SentinelResultBackend+sentinel://...`"""
