"""Deliveries, and a dispatcher whose receivers are scripted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from config.settings import Settings
from tasks.outbox import Delivery, Outbox, delivery_id
from tests.support.receiver import SECRET
from worker.delivery.callback_dispatcher import CallbackDispatcher
from worker.delivery.retry import AttemptResult

OK = AttemptResult(204, "status 204")
KEEP_S = 1_000


def delivery(number: int = 1, url: str = "https://shop.test/hook", **fields: Any) -> Delivery:
    id = delivery_id(f"job-{number}", "job.succeeded")
    body = json.dumps({"type": "job.succeeded", "data": {"id": f"job-{number}"}})
    return replace(Delivery(id, f"job-{number}", "job.succeeded", url, "main", body), **fields)


class Answers:
    """A `post` that returns or raises these, then returns 204."""

    def __init__(self, *answers: AttemptResult | Exception) -> None:
        self._answers = list(answers)
        self.posted: list[Delivery] = []

    def __call__(self, delivery: Delivery) -> AttemptResult:
        self.posted.append(delivery)
        answer = self._answers.pop(0) if self._answers else OK
        if isinstance(answer, Exception):
            raise answer
        return answer


@contextmanager
def dispatching(
    outbox: Outbox, post: Callable[[Delivery], AttemptResult], **given: Any
) -> Iterator[CallbackDispatcher]:
    chosen = {"callback_schedule_s": (0, 0.05, 0.05), "callback_timeout_s": 1.0, **given}
    running = CallbackDispatcher(outbox, Settings(callback_keys=f"main={SECRET}", **chosen), post)
    running.start()
    try:
        yield running
    finally:
        running.stop()


def counted(outbox: Outbox, **counts: int) -> None:
    """Wait for these numbers."""
    end = time.monotonic() + 10
    while {state: outbox.counts()[state] for state in counts} != counts:
        assert time.monotonic() < end, outbox.counts()
        time.sleep(0.02)
