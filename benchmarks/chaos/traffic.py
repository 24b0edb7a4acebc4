"""The producer of the jobs and the receiver of their results: each in a thread, with a ledger."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import redis
from celery import Celery, states
from kombu.exceptions import OperationalError

from benchmarks.chaos.ledger import Accepted, End, Ledger, now
from benchmarks.chaos.site import Site
from tasks.client import Client
from tasks.errors import QueueFull
from tasks.payloads import Complete
from worker.models.fake import POISON
from worker.queue.result_backend import TAKEN

logger = logging.getLogger(__name__)

PREFIX = "celery-task-meta-"
#: Seconds between two reads of all jobs that have not ended.
READ_S = 0.5


@dataclass(frozen=True, slots=True)
class Plan:
    """One job."""

    id: str
    priority: int
    tokens: int
    countdown: float
    is_poison: bool
    is_linked: bool
    is_pictured: bool


def plan(count: int, poison: int, seed: int) -> list[Plan]:
    """So many jobs; every hundredth or so of them is poison, `poison` in all."""
    chance = random.Random(seed)
    poisonous = set(chance.sample(range(count), poison))
    return [_plan(number, number in poisonous, chance) for number in range(count)]


def _plan(number: int, is_poison: bool, chance: random.Random) -> Plan:
    return Plan(
        id=f"job-{number:05}",
        priority=chance.randrange(10),
        tokens=chance.randint(1, 8),
        countdown=round(chance.uniform(0.5, 4.0), 2) if chance.random() < 0.1 else 0.0,
        is_poison=is_poison,
        is_linked=not is_poison and chance.random() < 0.2,
        is_pictured=not is_poison and chance.random() < 0.15,
    )


class Producer(threading.Thread):
    """A web backend that sends its jobs evenly, and each until the broker has it."""

    def __init__(self, site: Site, jobs: list[Plan], per_s: float) -> None:
        super().__init__(name="producer", daemon=True)
        self._site, self._jobs, self._per_s = site, jobs, per_s
        self._ledger = Ledger(site.folder / "producer.jsonl")
        # Without results: it never reads them.
        self._app = Celery("producer", broker=f"redis://127.0.0.1:{site.port}/0", set_as_current=False)
        self._app.conf.broker_transport_options = {"priority_steps": list(range(10))}
        self._client = Client(app=self._app)
        self.accepted: list[str] = []

    def run(self) -> None:
        started = time.monotonic()
        for number, job in enumerate(self._jobs):
            time.sleep(max(0.0, started + number / self._per_s - time.monotonic()))
            while not self._send(job):
                # The broker is away, and may have the job all the same: its id makes two messages one job.
                time.sleep(0.2)
            self._ledger.write(Accepted(now(), job.id, job.countdown, job.is_poison, job.is_linked, job.is_pictured))
            self.accepted.append(job.id)

    def _send(self, job: Plan) -> bool:
        prompt: list[Any] = [POISON if job.is_poison else f"This is {job.id}"]
        if job.is_pictured:
            prompt.insert(0, {"image": self._site.pictures.url})
        options: dict[str, Any] = {"countdown": job.countdown} if job.countdown else {}
        if job.is_linked:
            options["link"] = self._note("link", job)
        if job.is_poison:
            options["link_error"] = self._note("errback", job)
        try:
            self._client.submit(
                Complete(prompt=prompt, max_new_tokens=job.tokens), priority=job.priority, task_id=job.id, **options
            )
        except (OperationalError, QueueFull, redis.RedisError, OSError):
            return False
        return True

    def _note(self, what: str, job: Plan) -> Any:
        return self._app.signature("chaos.note", args=(what, job.id), queue="notes", immutable=True)


class Receiver(threading.Thread):
    """Reads ends as they are published, and the records themselves: from time to time, and all of them at last."""

    def __init__(self, site: Site, producer: Producer) -> None:
        super().__init__(name="receiver", daemon=True)
        self._site, self._producer = site, producer
        self._ledger = Ledger(site.folder / "receiver.jsonl")
        self._is_closing = threading.Event()
        self.ended: set[str] = set()

    def run(self) -> None:
        while not self._is_closing.is_set():
            try:
                self._receive()
            except (redis.RedisError, OSError):
                time.sleep(0.2)

    def close(self) -> None:
        """Read every record once more: what has ended must be what it was."""
        self._is_closing.set()
        self.join()
        self._read(self._producer.accepted)

    def _receive(self) -> None:
        with self._site.connect(1) as client, client.pubsub() as published:
            published.psubscribe(f"{PREFIX}*")
            read_at = 0.0
            while not self._is_closing.is_set():
                message = published.get_message(timeout=READ_S)
                if message is not None and message["type"] == "pmessage":
                    self._note(message["channel"].decode(), message["data"])
                if time.monotonic() - read_at > READ_S:
                    self._read([id for id in list(self._producer.accepted) if id not in self.ended])
                    read_at = time.monotonic()

    def _read(self, ids: Iterable[str]) -> None:
        keys = [PREFIX + id for id in ids]
        with self._site.connect(1) as client:
            for key, record in zip(keys, client.mget(keys) if keys else [], strict=True):
                if record is not None:
                    self._note(key, record)

    def _note(self, key: str, record: bytes) -> None:
        meta = json.loads(record)
        if meta["status"] not in states.READY_STATES:
            return
        id = key.removeprefix(PREFIX)
        self.ended.add(id)
        # When its message was taken last is written into an ended record: the end stays the same.
        end = json.dumps({name: value for name, value in meta.items() if name != TAKEN}, sort_keys=True)
        digest = hashlib.sha256(end.encode()).hexdigest()[:16]
        self._ledger.write(End(now(), id, meta["status"], digest, _code(meta)))


def _code(meta: dict[str, Any]) -> str:
    """A failure's first argument: see docs/errors.md."""
    if meta["status"] != states.FAILURE:
        return ""
    arguments = meta["result"].get("exc_message") or [""]
    return str(arguments[0] if isinstance(arguments, list) else arguments)
