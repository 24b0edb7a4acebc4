"""The job that a delivery is about, for the log."""

from __future__ import annotations

import contextlib
import json
from contextlib import AbstractContextManager

from tasks.outbox import Delivery
from worker.observability.job_fields import about_job


def about_delivery(delivery: Delivery) -> AbstractContextManager[None]:
    """In the block, this thread's log records are about the delivery's job. A batch is about no single one."""
    if not delivery.job:
        return contextlib.nullcontext()
    try:
        data = json.loads(delivery.body)["data"]
        return about_job(delivery.job, data["task"], (data["error"] or {}).get("code"))
    except (ValueError, TypeError, KeyError):
        # A record that another program wrote.
        return about_job(delivery.job)
