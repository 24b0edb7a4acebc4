"""Traces: a span for each run of a job, its stages and its callback. Off unless IDEFICS_TRACES=otlp.

The functions here are called everywhere and do nothing while traces are off; OpenTelemetry is then not imported. What
they do otherwise is in `worker/observability/otel.py`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from celery.signals import before_task_publish

if TYPE_CHECKING:
    from worker.observability.otel import Spans

_spans: Spans | None = None


def start(traces: str, process: str) -> None:
    """Start traces in this process of a worker, if they are on. Ends the program with the cure if they cannot be."""
    global _spans
    if traces == "otlp":
        from worker.observability.otel_setup import spans

        _spans = spans(process)
        before_task_publish.connect(_continue_trace, weak=False)


def _continue_trace(headers: dict[str, Any] | None = None, **_: Any) -> None:
    """What a job leads to continues its trace: links, later tasks of chains, retries."""
    if headers is not None:
        headers.update(carrier())


def stop() -> None:
    """Send the spans that are left, within seconds. For a process that ends without Python's exit handlers."""
    if _spans is not None:
        _spans.stop()


def describe(model: str) -> None:
    """The id of the model that answers this process's jobs."""
    if _spans is not None:
        _spans.model = model


# One run of a job


def job(task: str, id: str, headers: Mapping[str, Any]) -> AbstractContextManager[None]:
    """In the block, this thread runs a job. `headers`: its message's, which may continue a producer's trace."""
    return contextlib.nullcontext() if _spans is None else _spans.job(task, id, headers)


def add_stage(name: str, started: float, ended: float) -> None:
    """Add a stage of this thread's job, with its times of time.monotonic()."""
    if _spans is not None:
        _spans.add_stage(name, started, ended)


@contextlib.contextmanager
def _timed(name: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        add_stage(name, started, time.monotonic())


def stage(name: str) -> AbstractContextManager[None]:
    """The block is a stage of this thread's job."""
    return contextlib.nullcontext() if _spans is None else _timed(name)


def note_state(state: str, result: Any = None) -> None:
    """The state, in Celery's words, that this thread's job has reached, and its result as JSON."""
    if _spans is not None:
        _spans.note_state(state, result)


def job_ended(
    task: str, id: str, headers: Mapping[str, Any], state: str, code: str = ""
) -> AbstractContextManager[None]:
    """A span for a job that the parent process ends itself. In the block its callback is recorded."""
    return contextlib.nullcontext() if _spans is None else _spans.job_ended(task, id, headers, state, code)


def carrier() -> dict[str, str]:
    """The headers by which a message that is sent now continues this thread's trace."""
    return {} if _spans is None else _spans.carrier()


def traceparent() -> str:
    """W3C's name of this thread's span; empty if there is none."""
    return carrier().get("traceparent", "")


def trace_id() -> str:
    """The id of this thread's trace, in hexadecimal digits; empty if there is none."""
    return traceparent()[3:35]


# The engine


def step(rows: Callable[[], int]) -> None:
    """A step of the engine ends here, and the next one begins. One a second is recorded. `rows`: its running rows."""
    if _spans is not None:
        _spans.steps.passed(rows)


# Callbacks


def attempt(delivery: Any) -> AbstractContextManager[Any]:
    """In the block, this thread attempts a delivery; gives a function to call with the attempt's result."""
    return contextlib.nullcontext(_ignore) if _spans is None else _spans.attempt(delivery)


def _ignore(result: Any) -> None:
    """Without traces."""
