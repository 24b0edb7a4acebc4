"""Spans in one process: which are recorded by default, and what a callback's are linked to."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased

from tasks.outbox import Delivery
from worker.delivery.retry import AttemptResult
from worker.observability.otel import STEP, Spans
from worker.observability.otel_sampling import RateSampler, default_sampler

PARENT = "00-dca8376339abc1b7014df5282fa568c5-272f242a75c80779-0"


class Recorded:
    def __init__(self, **options: Any) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False, **options)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.spans = Spans(provider)

    def named(self, name: str) -> list[Any]:
        return [span for span in self._exporter.get_finished_spans() if span.name == name]


def test_by_default_ten_jobs_a_second_are_recorded() -> None:
    now = [5.5]
    recorded = Recorded(sampler=ParentBased(RateSampler(lambda: now[0])))
    for seconds, count in ((0.0, 10), (0.4, 10), (0.6, 20)):
        now[0] = 5.5 + seconds
        for number in range(30):
            with recorded.spans.job("idefics.chat", str(number), {}):
                """It runs."""
        assert len(recorded.named("idefics.chat")) == count


def test_by_default_each_job_of_a_sampled_trace_is_recorded() -> None:
    recorded = Recorded(sampler=default_sampler())
    for flag, count in (("0", 0), ("1", 20)):
        for _ in range(20):
            with recorded.spans.job("idefics.caption", "x", {"traceparent": PARENT + flag}):
                """It runs."""
        assert len(recorded.named("idefics.caption")) == count


def test_one_step_a_second_is_recorded_while_rows_run() -> None:
    recorded = Recorded()
    for rows in (0, 3, 3, 4, 4):
        recorded.spans.steps.passed(lambda rows=rows: rows)
    (step,) = recorded.named(STEP)
    assert step.attributes == {"idefics.batch.rows": 3}
    assert recorded.spans.steps.between(0, float("inf")) == [step.context]
    assert recorded.spans.steps.between(0, 1e-9) == []


def test_a_run_that_is_not_recorded_has_no_stages_and_still_continues_its_trace() -> None:
    recorded = Recorded()
    with recorded.spans.job("idefics.caption", "x", {"traceparent": PARENT + "0"}):
        recorded.spans.add_stage("wait", 0, 1)
        traceparent = recorded.spans.carrier()["traceparent"]
    assert traceparent.split("-")[1] == PARENT.split("-")[1]
    assert traceparent.endswith("-00")
    assert not recorded.named("wait")


def test_a_batch_of_callbacks_is_linked_to_its_jobs() -> None:
    recorded = Recorded()
    traces = f"{PARENT}1 {PARENT.replace('dca8', 'abcd')}1 nonsense"
    delivery = Delivery("msg", "", "job.batch", "https://example.com/s3cr3t", "main", "{}", traces=traces)
    with recorded.spans.attempt(delivery) as note:
        note(AttemptResult(status=503, note="status 503"))
    (span,) = recorded.named("callback")
    assert span.parent is None
    assert [f"{link.context.trace_id:032x}"[:4] for link in span.links] == ["dca8", "abcd"]
    assert (span.attributes["error.type"], span.status.is_ok) == ("503", False)
    assert "s3cr3t" not in span.to_json()


def test_a_defect_leaves_no_message_in_a_span() -> None:
    recorded = Recorded()
    delivery = Delivery("msg", "x", "job.failed", "https://example.com/", "main", "{}")
    with pytest.raises(LookupError), recorded.spans.attempt(delivery):
        raise LookupError("https://example.com/?s3cr3t")
    with pytest.raises(LookupError), recorded.spans.job("idefics.caption", "x", {}):
        raise LookupError("https://example.com/?s3cr3t")
    told = [span.to_json() for name in ("callback", "idefics.caption") for span in recorded.named(name)]
    assert len(told) == 2
    assert "s3cr3t" not in "".join(told)


@pytest.mark.parametrize("headers", [{"traceparent": 7}, {"traceparent": ["00"]}, {"tracestate": {}}, {"baggage": "%"}])
def test_headers_of_other_forms_begin_a_trace(headers: dict[str, Any]) -> None:
    recorded = Recorded()
    with recorded.spans.job("idefics.caption", "x", headers):
        """It runs."""
    assert recorded.named("idefics.caption")[0].parent is None
