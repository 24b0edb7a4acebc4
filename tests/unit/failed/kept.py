"""Failed jobs, and the list that keeps them."""

from __future__ import annotations

import json
import time
from typing import Any

from tasks.failed import FailedBounds, FailedJob, FailedJobs
from worker.demo.stack import Broker

WIDE = FailedBounds(jobs=100, bytes=1_000_000, ttl_s=86_400)
URL = "https://example.com/a.jpg"


def job(id: str, code: str = "image_unreachable", age_s: float = 0.0, **fields: Any) -> FailedJob:
    known: dict[str, Any] = {
        "task": "idefics.caption", "message": "No.", "host": "a@b", "attempts": 4, "submitted_at": None,
    }  # fmt: skip
    return FailedJob(**{"id": id, "code": code, "failed_at": time.time() - age_s, **known, **fields})


def signature(id: str, **options: Any) -> dict[str, Any]:
    return {
        "task": "idefics.caption",
        "args": [],
        "kwargs": {"image": URL},
        "options": {"task_id": id, "queue": "idefics", "priority": 7, **options},
        "subtask_type": None,
        "immutable": False,
    }


def keep(jobs: FailedJobs, *kept: FailedJob, bounds: FailedBounds = WIDE) -> None:
    for one in kept:
        jobs.keep(one, signature(one.id), bounds)


def ids(jobs: FailedJobs) -> list[str]:
    return [job.id for job in jobs]


def message(broker: Broker, priority: int = 7) -> dict[str, Any]:
    """The queue's one message."""
    (raw,) = broker.connect().lrange(f"idefics\x06\x16{priority}", 0, -1)
    return dict(json.loads(raw))


def _run(**_: Any) -> None:
    """A task's body."""
