"""Spans of a worker by OpenTelemetry's API. Imported only if traces are on: call `worker/observability/tracing.py`.

A run of a job is one span, begun when its message was sent; its stages are children, made when it ends from times that
are measured anyway. No attribute holds a prompt, a URL or an error's message. The attributes' names are those of
OpenTelemetry's conventions for generative AI and messaging; our own begin with `idefics.`.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, Tracer

from tasks.outbox import Delivery
from tasks.protocol import SUBMITTED_AT, seconds_since
from worker.observability.job_fields import current_code

NAME = "idefics"
#: By task; all others generate content from a picture.
OPERATIONS = {"idefics.chat": "chat", "idefics.complete": "text_completion"}
#: The name of the spans of recorded steps.
STEP = "engine step"
#: Seconds between the starts of two recorded steps, and recorded steps that are kept to link jobs to them.
STEP_INTERVAL_S, KEPT_STEPS = 1.0, 64
#: Seconds that the end of a process waits for its last spans to be sent.
STOP_S = 2.0
#: Characters of a header that may continue a trace.
MAX_HEADER_CHARS = 8_192


class Stage(NamedTuple):
    """A part of a job's run, between two times of time.monotonic()."""

    name: str
    started: float
    ended: float


@dataclass(slots=True)
class JobSpan:
    """The span of a job that runs in this thread, and what is added to it at its end."""

    span: Span
    stages: list[Stage]
    state: str = ""
    result: Mapping[str, Any] | None = None


_job: ContextVar[JobSpan | None] = ContextVar("job_span", default=None)


class Spans:
    """Makes the spans of one process. Thread-safe."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._tracer: Tracer = provider.get_tracer(NAME)
        self.model = ""
        self.steps = Steps(self._tracer)
        atexit.register(self.stop)

    def stop(self) -> None:
        """Send the spans that are left, for STOP_S seconds at most, even if their receiver does not answer."""
        shut_down = getattr(self._provider, "shutdown", None)
        if shut_down is not None:
            thread = threading.Thread(target=shut_down, daemon=True, name="last-spans")
            thread.start()
            thread.join(STOP_S)

    # One run of a job

    @contextlib.contextmanager
    def job(self, task: str, id: str, headers: Mapping[str, Any]) -> Iterator[None]:
        span = self._start(task, id, headers)
        if not span.is_recording():
            with trace.use_span(span):
                yield
            return
        started = time.monotonic()
        job = JobSpan(span, [Stage("queued", started - seconds_since(headers.get(SUBMITTED_AT) or None), started)])
        token = _job.set(job)
        try:
            with trace.use_span(span, record_exception=False, set_status_on_exception=False):
                yield
        finally:
            _job.reset(token)
            self._finish(job)

    def add_stage(self, name: str, started: float, ended: float) -> None:
        job = _job.get()
        if job is not None:
            job.stages.append(Stage(name, started, ended))

    def note_state(self, state: str, result: Mapping[str, Any] | None) -> None:
        job = _job.get()
        if job is not None:
            job.state, job.result = state, result

    @contextlib.contextmanager
    def job_ended(self, task: str, id: str, headers: Mapping[str, Any], state: str, code: str) -> Iterator[None]:
        span = self._start(task, id, headers)
        _set_end(span, state, code)
        with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            yield

    def carrier(self) -> dict[str, str]:
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        return carrier

    def _start(self, task: str, id: str, headers: Mapping[str, Any]) -> Span:
        submitted_at = headers.get(SUBMITTED_AT)
        queue = (headers.get("delivery_info") or {}).get("routing_key")
        return self._tracer.start_span(
            task,
            context=_context(headers),
            kind=SpanKind.CONSUMER,
            attributes={
                "messaging.operation.type": "process",
                "messaging.destination.name": str(queue),
                "messaging.message.id": id,
                "gen_ai.operation.name": OPERATIONS.get(task, "generate_content"),
                "gen_ai.provider.name": NAME,
                "gen_ai.request.model": self.model,
                "idefics.retries": headers.get("retries") or 0,
            },
            start_time=_ns(submitted_at) if submitted_at and submitted_at < time.time() else None,
        )

    def _finish(self, job: JobSpan) -> None:
        # From time.monotonic() to nanoseconds of the clock.
        offset = time.time() - time.monotonic()
        parent = trace.set_span_in_context(job.span)
        for stage in job.stages:
            span = self._tracer.start_span(stage.name, parent, start_time=_ns(stage.started + offset))
            span.end(_ns(stage.ended + offset))
            if stage.name == "generate":
                for context in self.steps.between(stage.started, stage.ended):
                    job.span.add_link(context)
        _set_end(job.span, job.state, current_code())
        if job.result is not None:
            job.span.set_attributes(_described(job.result))
        job.span.end()

    # Callbacks

    @contextlib.contextmanager
    def attempt(self, delivery: Delivery) -> Iterator[Callable[[Any], None]]:
        contexts = [_context({"traceparent": traceparent}) for traceparent in delivery.traces.split()]
        span = self._tracer.start_span(
            "callback",
            context=contexts[0] if len(contexts) == 1 else None,
            kind=SpanKind.CLIENT,
            links=None if len(contexts) == 1 else list(_links(contexts)),
            attributes={
                "messaging.message.id": delivery.id,
                "http.request.method": "POST",
                "http.request.resend_count": delivery.attempts,
                "idefics.event": delivery.event,
                "idefics.job": delivery.job,
            },
        )

        def note(result: Any) -> None:
            if result.status is not None:
                span.set_attribute("http.response.status_code", result.status)
            if result.status is None or not 200 <= result.status < 300:
                span.set_attribute("error.type", str(result.status or "no_response"))
                span.set_status(Status(StatusCode.ERROR))

        # Not the error's message either, which may hold the URL.
        with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            yield note


class Steps:
    """One of the engine's steps a second, as a span of its own, for links from the jobs that it served."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._next = 0.0
        #: Of the step that is recorded: its beginning and its rows.
        self._open: tuple[float, int] | None = None
        self._kept: deque[tuple[float, float, SpanContext]] = deque(maxlen=KEPT_STEPS)

    def passed(self, rows: Callable[[], int]) -> None:
        """Called by the engine's thread between two steps."""
        now = time.monotonic()
        if self._open is not None:
            self._record(*self._open, now)
            self._open = None
        elif now >= self._next and (running := rows()):
            self._open, self._next = (now, running), now + STEP_INTERVAL_S

    def between(self, started: float, ended: float) -> list[SpanContext]:
        """The recorded steps that began between two times of time.monotonic()."""
        return [context for begun, _, context in tuple(self._kept) if started <= begun <= ended]

    def _record(self, begun: float, rows: int, ended: float) -> None:
        offset = time.time() - time.monotonic()
        span = self._tracer.start_span(
            STEP, Context(), attributes={"idefics.batch.rows": rows}, start_time=_ns(begun + offset)
        )
        span.end(_ns(ended + offset))
        if span.get_span_context().trace_flags.sampled:
            self._kept.append((begun, ended, span.get_span_context()))


def _context(headers: Mapping[str, Any]) -> Context:
    """The trace that a message continues. Its headers are untrusted; OpenTelemetry would log a malformed baggage."""
    texts = {name: headers.get(name) for name in propagate.get_global_textmap().fields - {"baggage"}}
    return propagate.extract(
        {name: text for name, text in texts.items() if isinstance(text, str) and len(text) <= MAX_HEADER_CHARS},
        Context(),
    )


def _links(contexts: Iterable[Context]) -> Iterator[Link]:
    for context in contexts:
        found = trace.get_current_span(context).get_span_context()
        if found.is_valid:
            yield Link(found)


def _set_end(span: Span, state: str, code: str) -> None:
    if state:
        span.set_attribute("celery.state", state)
    if code:
        span.set_attribute("error.type", code)
        span.set_status(Status(StatusCode.ERROR, code))


def _described(result: Mapping[str, Any]) -> dict[str, Any]:
    usage = result["usage"]
    return {
        "gen_ai.response.model": result["model"]["id"],
        "gen_ai.response.finish_reasons": [result["finish_reason"]],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "idefics.usage.images": usage["images"],
    }


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
