"""Jobs as the service takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tasks.payloads import Job, parse
from worker.jobs.runs import JobContext
from worker.jobs.service import Service

Start = Callable[..., Service]
#: Seconds that a test waits for what takes milliseconds.
SOON = 5.0
CONTEXT = JobContext(id="job")


def job(task: str, **arguments: Any) -> Job:
    return parse(f"idefics.{task}", arguments)


def complete(text: str, **arguments: Any) -> Job:
    return job("complete", prompt=[text], **arguments)
