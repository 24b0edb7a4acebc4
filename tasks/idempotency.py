"""Idempotency keys: the same key with the same payload is the same job; with another payload it is refused.

A key belongs to a queue: the same key in another model's queue is a different one. The first user of a key (our client
when it submits, or a worker when it starts a job) claims it in the results' Redis, under `idefics:key:` and the SHA-256
of queue and key. The record says which job the key stands for. It expires before that job's result does, so that a key
never leads to an expired answer.

The id of a job gives access to its answer, and all producers may read these records. So a record shows neither the id
nor the payload: only a reader who knows the payload can check whether it is the same (`check`, its salted SHA-256) and
decrypt the id, which is XORed with a stream of SHAKE-256 of the payload and the salt. Each id has its own salt, so that
no stream is used twice. A payload that is easily guessed gives no protection.

The client claims before it sends, and confirms afterwards. A claim that was never confirmed, since its producer died in
between, is sent again by the next `submit` with that key, or taken over by the first job with it that reaches a worker.
The same happens if the job was begun and its stored result is gone, since its answer was forgotten.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .errors import InvalidRequest
from .payloads import Job
from .protocol import QUEUE
from .redis_keys import IDEMPOTENCY

if TYPE_CHECKING:
    from redis import Redis

#: Seconds after which a claim whose job was never sent may be taken over. Retries of publishing take less.
ABANDONED_S = 60.0

_REPLACE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'KEEPTTL')
if ARGV[3] ~= '0' then redis.call('EXPIRE', KEYS[1], ARGV[3]) end
return 1
"""


@dataclass(frozen=True, slots=True)
class Claim:
    """The job that a key stands for."""

    #: The job's id.
    id: str
    #: Digest of its payload. It decrypts the id, and is not in the record.
    digest: str
    #: Unix seconds.
    claimed_at: float
    #: Whether its message has been queued.
    is_sent: bool
    #: Whether a worker has begun it.
    is_started: bool = False
    #: Hexadecimal; a new one for each id.
    salt: str = field(default_factory=lambda: secrets.token_hex(16))

    def is_abandoned(self, now: float) -> bool:
        """Whether a job without a stored result was never sent, or its answer was forgotten."""
        return self.is_started or (not self.is_sent and now - self.claimed_at > ABANDONED_S)


class IdempotencyKeys:
    """Claims in Redis. Its methods raise redis.RedisError if Redis does not answer."""

    def __init__(self, redis: Redis, ttl_s: int | None, queue: str = QUEUE, prefix: str = "") -> None:
        """`queue` is the jobs' queue; `prefix` stands before each key, as in the app's options."""
        self._redis = redis
        self._prefix = prefix
        self._ttl_s = ttl_s or None
        self._queue = queue

    def claim(self, job: Job, id: str, *, is_sent: bool) -> Claim:
        """The claim on the job's key: an existing one, or a new one for this `id`.

        Raises InvalidRequest if the key stands for another payload.
        """
        mine = Claim(id, digest(job), time.time(), is_sent)
        name = self._name(job)
        while not self._redis.set(name, _written(mine), nx=True, ex=self._ttl_s):
            kept = self._redis.get(name)
            # The existing claim may have expired in between.
            if kept is not None:
                return _same_payload(kept, mine)
        return mine

    def claim_again(self, job: Job, claim: Claim) -> Claim:
        """Renew a claim whose job's answer was forgotten: the job must be sent again."""
        again = replace(claim, claimed_at=time.time(), is_sent=False, is_started=False)
        self._redis.set(self._name(job), _written(again), xx=True, keepttl=True)
        return again

    def confirm(self, job: Job, claim: Claim) -> None:
        """Record that the message has been queued."""
        # Not over the record of a worker that has begun the job meanwhile.
        if self._redis.get(self._name(job)) == _written(claim).encode():
            self._redis.set(self._name(job), _written(replace(claim, is_sent=True)), xx=True, keepttl=True)

    def start(self, job: Job, claim: Claim) -> None:
        """Record that the job begins, and set the worker's own time to live: a producer does not know how long workers
        keep results."""
        self._redis.set(self._name(job), _written(replace(claim, is_sent=True, is_started=True)), ex=self._ttl_s)

    def take_over(self, job: Job, claim: Claim, id: str) -> bool:
        """Give an abandoned claim to this job, which begins. False if another job was faster."""
        mine = Claim(id, claim.digest, time.time(), is_sent=True, is_started=True)
        return bool(self._redis.eval(_REPLACE, 1, self._name(job), _written(claim), _written(mine), self._ttl_s or 0))

    def _name(self, job: Job) -> str:
        # Hashed, since a key may be long or confidential.
        named = json.dumps([self._queue, job.idempotency_key or ""])
        return self._prefix + IDEMPOTENCY.named(hashlib.sha256(named.encode()).hexdigest())


def digest(job: Job) -> str:
    """Digest of the task and all fields except the key itself and `metadata`, which changes no answer.

    Fields at their defaults are left out, so that a field added in a later version changes no digest.
    """
    asked = job.model_dump(mode="json", exclude_defaults=True, exclude={"idempotency_key", "metadata"})
    return hashlib.sha256(json.dumps([job.task, asked], sort_keys=True).encode()).hexdigest()


def _same_payload(kept: bytes | str, mine: Claim) -> Claim:
    """The claim in a record, read with the same payload. Raises InvalidRequest for another payload."""
    record = json.loads(kept)
    if record["check"] != _check(mine.digest, record["salt"]):
        raise InvalidRequest(
            # Without the job's id, which gives access to its answer.
            "idempotency_key: another job has this key and another payload. Give each payload its own key, or "
            "repeat the first one unchanged."
        )
    id = _sealed(bytes.fromhex(record["id"]), mine.digest, record["salt"]).decode()
    return Claim(id, mine.digest, record["claimed_at"], record["is_sent"], record["is_started"], record["salt"])


def _written(claim: Claim) -> str:
    return json.dumps(
        {
            "check": _check(claim.digest, claim.salt),
            "id": _sealed(claim.id.encode(), claim.digest, claim.salt).hex(),
            "claimed_at": claim.claimed_at,
            "is_sent": claim.is_sent,
            "is_started": claim.is_started,
            "salt": claim.salt,
        }
    )


def _check(digest: str, salt: str) -> str:
    return hashlib.sha256(f"check {salt} {digest}".encode()).hexdigest()


def _sealed(id: bytes, digest: str, salt: str) -> bytes:
    """XOR with a stream made of the digest and the salt. A second call restores the id."""
    stream = hashlib.shake_256(f"id {salt} {digest}".encode()).digest(len(id))
    return bytes(one ^ other for one, other in zip(id, stream, strict=True))
