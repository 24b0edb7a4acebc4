"""Traces across a producer and the three processes of our workers, received by OTLP as a collector does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from tasks import Callback, Chat, Client, Complete, ImageBlocked, Job, WorkerLost
from tests.flow.test_log import RECEIVING
from tests.support.gallery import Gallery
from tests.support.json_log import about
from tests.support.otlp import ReceivedSpan, TraceReceiver
from tests.support.receiver import Receiver
from tests.support.stand import callbacks_worker
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack
from worker.models.fake import POISON

SECRET = "s3cr3t"
#: A PYTHONPATH without OpenTelemetry.
WITHOUT = os.pathsep.join(
    [str(stack.CHECKOUT / "tests" / "support" / "no_opentelemetry"), os.environ.get("PYTHONPATH", "")]
)
TRACER = TracerProvider().get_tracer("producer")


@dataclass(frozen=True)
class Traced:
    """Workers with traces, and who receives them."""

    #: With the logs of both workers.
    folder: Path
    url: str
    client: Client
    traces: TraceReceiver
    receiver: Receiver
    gallery: Gallery

    def submit(self, job: Job, id: str, **options: Any) -> str:
        """Submit a job in a span of the producer's, whose trace it returns."""
        with TRACER.start_as_current_span("request") as span:
            self.client.submit(job, task_id=id, **options)
        return trace.format_trace_id(span.get_span_context().trace_id)

    def callback(self) -> Callback:
        return Callback(url=f"{self.receiver.url}?{SECRET}", key_id="main")

    def spans(self, trace_id: str, *names: str) -> list[ReceivedSpan]:
        """The spans of these names in a trace, once all have been received."""
        eventually(lambda: all(self.traces.of(name, trace_id) for name in names))
        return [span for name in names for span in self.traces.of(name, trace_id)]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    folder = tmp_path_factory.mktemp("traces")
    with ExitStack() as started, pytest.MonkeyPatch.context() as patch:
        traces, receiver = started.enter_context(TraceReceiver().open()), started.enter_context(Receiver().open())
        for name, value in traces.variables.items():
            patch.setenv(name, value)
        server, gallery = started.enter_context(stack.broker()), started.enter_context(Gallery().open())
        images = {"IMAGE_ALLOW_NETWORKS": "127.0.0.0/8", "IMAGE_PORTS": str(gallery.port)}
        settings = {"LOG_FORMAT": "json", "TRACES": "otlp", "CALLBACK_PORTS": str(receiver.port), **images, **RECEIVING}
        model = {"MODEL": "fake:0.02", "MAX_RETRIES": "1", "RETRY_BACKOFF_S": "0.1"}
        started.enter_context(stack.worker(server, settings={**settings, **model}, log=folder / "log"))
        started.enter_context(callbacks_worker(server, folder / "callbacks", settings))
        yield Traced(folder, server.url, Client(server.url, check_callbacks=False), traces, receiver, gallery)


def test_one_trace_goes_from_the_producer_to_the_callback(traced: Traced) -> None:
    found = traced.submit(Complete(prompt=[f"{SECRET} " * 20], max_new_tokens=60, callback=traced.callback()), "well")
    job, callback, queued, wait, generate = traced.spans(
        found, "idefics.complete", "callback", "queued", "wait", "generate"
    )
    assert (job.process, callback.process) == ("model", "callbacks")
    assert callback.parent == job.id
    assert {stage.parent for stage in (queued, wait, generate)} == {job.id}
    # One after the other, from the submission to the end.
    stages = [queued, wait, generate]
    assert queued.started == pytest.approx(job.started, abs=0.01)
    assert all(earlier.ended <= later.started + 1e-3 for earlier, later in pairwise(stages))
    assert generate.ended - generate.started > 1
    assert job.ended >= generate.ended
    assert job.attributes["messaging.message.id"] == "well"
    assert job.attributes["messaging.destination.name"] == "idefics"
    assert job.attributes["gen_ai.operation.name"] == "text_completion"
    assert job.attributes["gen_ai.request.model"] == job.attributes["gen_ai.response.model"] == "fake"
    assert job.attributes["gen_ai.usage.input_tokens"] > 0
    assert job.attributes["gen_ai.usage.output_tokens"] == 60
    assert job.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert job.attributes["celery.state"] == "SUCCESS"
    assert callback.attributes["http.response.status_code"] == 204
    assert not job.is_error | callback.is_error
    # The log names it.
    for log in ("log", "callbacks"):
        ended = [record for record in about(traced.folder / log, "well") if record["process"] != "parent"]
        assert {record["trace_id"] for record in ended} == {found}
    # The receiver may continue it.
    (call,) = [call for call in traced.receiver.calls if b'"well"' in call.body]
    assert call.headers["traceparent"].split("-")[1:3] == [found, callback.id]


def test_a_producer_may_use_opentelemetrys_instrumentation_of_celery(traced: Traced) -> None:
    command = [sys.executable, "-m", "tests.support.instrumented_producer", traced.url]
    found = subprocess.run(command, cwd=stack.CHECKOUT, check=True, capture_output=True, text=True).stdout.strip()
    request, sent, job = traced.spans(found, "request", "apply_async/idefics.complete", "idefics.complete")
    assert (request.process, sent.process, job.process) == ("producer", "producer", "model")
    assert (sent.parent, job.parent) == (request.id, sent.id)


def test_a_job_is_linked_to_the_steps_that_served_it(traced: Traced) -> None:
    found = traced.submit(Complete(prompt=["Hello"], max_new_tokens=150), "long")
    (job,) = traced.spans(found, "idefics.complete")
    assert 1 <= len(job.links) <= 5
    eventually(lambda: set(job.links) <= {step.id for step in traced.traces.of("engine step")})
    for step in traced.traces.of("engine step"):
        assert step.trace != found
        assert step.attributes == {"idefics.batch.rows": 1}
        assert 0 < step.ended - step.started < 1


def test_an_error_has_its_code_and_not_its_message(traced: Traced) -> None:
    image = {"image": f"http://10.1.2.3/{SECRET}"}
    found = traced.submit(Complete(prompt=[SECRET, image], callback=traced.callback()), "blocked")
    job, callback = traced.spans(found, "idefics.complete", "callback")
    assert job.is_error
    assert (job.attributes["error.type"], job.attributes["celery.state"]) == (ImageBlocked.code, "FAILURE")
    assert callback.parent == job.id


def test_a_retry_continues_the_trace(traced: Traced) -> None:
    found = traced.submit(Complete(prompt=[{"image": traced.gallery.broken("broken", 9)}]), "retried")
    eventually(lambda: len(traced.traces.of("idefics.complete", found)) == 2)
    first, second = sorted(traced.traces.of("idefics.complete", found), key=lambda span: span.ended)
    assert (first.attributes["celery.state"], second.attributes["celery.state"]) == ("RETRY", "FAILURE")
    assert second.attributes["idefics.retries"] == 1
    assert second.parent == first.id


def test_jobs_that_the_parent_process_ends_are_spans_too(traced: Traced) -> None:
    lost = traced.submit(Complete(prompt=[POISON], callback=traced.callback()), "poison")
    job, callback = traced.spans(lost, "idefics.complete", "callback")
    assert (job.process, job.attributes["error.type"]) == ("parent", WorkerLost.code)
    assert callback.parent == job.id
    expired = traced.submit(
        Complete(prompt=["Hello"], callback=traced.callback()), "late", expires=datetime.now(UTC) - timedelta(seconds=1)
    )
    job, callback = traced.spans(expired, "idefics.complete", "callback")
    assert (job.process, job.attributes["celery.state"]) == ("parent", "REVOKED")
    assert callback.parent == job.id


def test_a_link_gets_the_trace_of_its_job(traced: Traced) -> None:
    follow = traced.client.app.signature(
        "idefics.chat", kwargs=Chat(messages=[{"role": "user", "content": "Hello"}]).arguments(), queue="idefics",
        immutable=True,
    )  # fmt: skip
    found = traced.submit(Complete(prompt=["Hello"], max_new_tokens=2), "linked", link=follow)
    first, second = traced.spans(found, "idefics.complete", "idefics.chat")
    assert second.parent == first.id
    assert second.attributes["gen_ai.operation.name"] == "chat"


@pytest.mark.parametrize("header", [7, ["00-1-1-01"], "x" * 9_000, "00-" + "0" * 32 + "-" + "0" * 16 + "-01", None])
def test_a_trace_header_of_another_form_begins_a_trace_of_its_own(traced: Traced, header: Any) -> None:
    options = {"headers": {"traceparent": header, "tracestate": header, "baggage": header}}
    result = traced.client.submit(Complete(prompt=["Hello"], max_new_tokens=2), **options)
    assert result.result(timeout=120).text == "lo"
    eventually(lambda: result.id in {span.attributes.get("messaging.message.id") for span in traced.traces.spans})


def test_a_canceled_job_is_a_span_of_both_processes(traced: Traced) -> None:
    found = traced.submit(Complete(prompt=["Hello"], max_new_tokens=500), "canceled")
    eventually(lambda: traced.client.status("canceled") == "processing")
    traced.client.cancel("canceled")
    with pytest.raises(TaskRevokedError):
        traced.client.app.AsyncResult("canceled").get(timeout=120)
    eventually(lambda: {span.process for span in traced.traces.of("idefics.complete", found)} == {"model", "parent"})
    assert {span.attributes["celery.state"] for span in traced.traces.of("idefics.complete", found)} == {"REVOKED"}


def test_a_pictures_stages_are_spans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"MODEL": "demo", "TRACES": "otlp", "IMAGE_ALLOW_NETWORKS": "127.0.0.0/8"}
    with ExitStack() as started:
        gallery, traces = started.enter_context(Gallery().open()), started.enter_context(TraceReceiver().open())
        for name, value in traces.variables.items():
            monkeypatch.setenv(name, value)
        server = started.enter_context(stack.broker())
        settings["IMAGE_PORTS"] = str(gallery.port)
        started.enter_context(stack.worker(server, settings=settings, log=tmp_path / "log"))
        prompt = [{"image": gallery.picture("a")}, {"image": gallery.picture("b")}, "A"]
        Client(server.url).submit(Complete(prompt=prompt, max_new_tokens=2)).result(timeout=120)
        eventually(lambda: traces.of("idefics.complete"))
    (job,) = traces.of("idefics.complete")
    assert job.attributes["idefics.usage.images"] == 2
    stages = ["queued", "fetch", "decode", "encode", "wait", "generate"]
    found = {name: traces.of(name, job.trace) for name in stages}
    # The gallery shows one picture under both names: it is decoded once.
    assert [len(found[name]) for name in stages] == [1, 2, 1, 1, 1, 1]
    assert {span.parent for spans in found.values() for span in spans} == {job.id}
    times = [(span.started, span.ended) for spans in found.values() for span in spans]
    assert all(job.started - 0.01 <= started <= ended <= job.ended for started, ended in times)
    assert max(span.ended for span in found["fetch"]) <= found["encode"][0].started + 1e-3


@pytest.mark.parametrize(
    ("variables", "cure"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "opentelemetry-exporter-otlp-proto-grpc"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "carrier-pigeon"}, "use http/protobuf or grpc"),
        ({"PYTHONPATH": WITHOUT}, "pip install opentelemetry-sdk"),
    ],
)
def test_traces_that_cannot_be_sent_end_the_start_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], cure: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with (
        stack.broker() as server,
        pytest.raises(stack.StartFailed, match=cure),
        stack.worker(server, settings={"MODEL": "fake", "TRACES": "otlp"}, log=tmp_path / "log"),
    ):
        pass


def test_a_collector_that_is_away_delays_neither_jobs_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{stack.free_port()}")
    with stack.broker() as server, stack.worker(server, settings={"MODEL": "fake", "TRACES": "otlp"}) as process:
        Client(server.url).submit(Complete(prompt=["Hello"], max_new_tokens=2)).result(timeout=PATIENCE_S)
        asked = time.monotonic()
        process.terminate()
        process.wait(20)
        assert time.monotonic() - asked < 6


def test_no_span_holds_a_prompt_or_a_url(traced: Traced) -> None:
    # After the others, which have both.
    assert traced.traces.raw
    told = "".join(traced.traces.raw)
    assert SECRET not in told
    assert "://" not in told.replace("https://opentelemetry.io/schemas/", "")


def test_without_the_setting_no_part_of_opentelemetry_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a package in its place that cannot be imported. (redis-py imports its API where it is installed.)"""
    monkeypatch.setenv("PYTHONPATH", WITHOUT)
    with stack.broker() as server, stack.worker(server, settings={"MODEL": "fake"}, log=tmp_path / "log"):
        job = Client(server.url).submit(Complete(prompt=["Hello"], max_new_tokens=2))
        assert job.result(timeout=120).text == "lo"
