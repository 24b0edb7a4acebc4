"""The simplest solution: a Celery task that calls `generate` once. `celery -A benchmarks.naive worker`."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from celery.signals import worker_process_init

from benchmarks.stock import Request, Stock

app = Celery("naive", broker=os.environ["IDEFICS_BROKER_URL"], backend=os.environ["IDEFICS_RESULT_BACKEND"])
app.conf.update(
    task_default_queue="naive",
    task_acks_late=True,
    task_track_started=True,
    worker_concurrency=1,
    worker_send_task_events=True,
    result_extended=True,
    broker_transport_options={"priority_steps": list(range(10)), "queue_order_strategy": "priority"},
)

_loaded: dict[str, Stock] = {}


@worker_process_init.connect(weak=False)  # type: ignore[untyped-decorator]
def _load(**_: Any) -> None:
    _loaded["stock"] = Stock(os.environ["BENCH_CHECKPOINT"], os.environ["BENCH_ROOT"], int(os.environ["BENCH_THREADS"]))


@app.task(name="naive.answer")  # type: ignore[untyped-decorator]
def answer(request: Request) -> dict[str, str]:
    return {"text": _loaded["stock"].answer([request])[0]}
