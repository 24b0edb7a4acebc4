"""Callbacks of jobs that have ended are recorded in the outbox, in a real Redis, before any acknowledgement."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from billiard.einfo import ExceptionInfo
from billiard.exceptions import Terminated
from celery import Celery, states
from celery.exceptions import BackendGetMetaError

from config.settings import Settings
from tasks.availability import UNAVAILABLE
from tasks.errors import DeadlineExceeded, ImageInvalid
from tasks.outbox import Delivery, Outbox
from tests.support.receiver import SECRET
from worker.delivery.recorder import CallbackRecorder
from worker.demo import stack
from worker.pool.request import JobRequest
from worker.queue.result_backend import DIGEST
from worker.runtime.exception_info import exception_info

CALLBACK = {"url": "https://93.184.216.34/hook", "key_id": "main"}
ARGUMENTS = {"prompt": ["Hello"], "callback": CALLBACK, "metadata": {"row": 7}}


@pytest.fixture
def app(broker: stack.Broker) -> Iterator[Celery]:
    address = f"redis://127.0.0.1:{broker.port}"
    app = Celery("recorded", broker=f"{address}/7", backend=f"{address}/8", set_as_current=False)
    app.conf.result_extended = True
    with broker.connect(7) as queues, broker.connect(8) as results:
        queues.flushdb()
        results.flushdb()
        yield app
        queues.flushdb()
    app.close()


@pytest.fixture
def recorder(app: Celery) -> CallbackRecorder:
    return CallbackRecorder(app, Settings(callback_keys=f"main={SECRET}"))


@pytest.fixture
def outbox(broker: stack.Broker) -> Outbox:
    return Outbox(broker.connect(7))


def record(recorder: CallbackRecorder, *end: Any, is_stored: bool = False, **arguments: Any) -> None:
    recorder.record("job-1", "idefics.complete", {**ARGUMENTS, **arguments}, end, is_stored=is_stored)


def only(outbox: Outbox) -> Delivery:
    (found,) = outbox.listed("pending", 10)
    return found


def nested(depth: int) -> dict[str, Any]:
    return {"deeper": nested(depth - 1)} if depth else {}


# What is recorded


def test_a_success_is_recorded_with_its_result(recorder: CallbackRecorder, outbox: Outbox) -> None:
    record(recorder, states.SUCCESS, {"text": "llo"})
    found = only(outbox)
    assert (found.job, found.event, found.url, found.key_id) == ("job-1", "job.succeeded", CALLBACK["url"], "main")
    data = json.loads(found.body)["data"]
    assert (data["id"], data["task"], data["result"]) == ("job-1", "idefics.complete", {"text": "llo"})
    assert (data["error"], data["metadata"]) == (None, {"row": 7})


def test_a_failure_is_recorded_with_its_detail(recorder: CallbackRecorder, outbox: Outbox) -> None:
    record(recorder, states.FAILURE, ImageInvalid("nothing there", detail="http_404"))
    error = json.loads(only(outbox).body)["data"]["error"]
    assert error == {"code": "image_invalid", "message": "nothing there", "detail": "http_404"}


def test_a_failure_is_recorded_with_its_code(recorder: CallbackRecorder, outbox: Outbox) -> None:
    record(recorder, states.FAILURE, ImageInvalid("no picture"))
    assert json.loads(only(outbox).body)["data"]["error"] == {"code": "image_invalid", "message": "no picture"}


@pytest.mark.parametrize("metadata", [{"n": float("nan")}, {"x": "a" * 100_000}, {"s": "\ud800"}, nested(50), [1]])
def test_metadata_that_a_job_is_refused_for_is_not_repeated(
    recorder: CallbackRecorder, outbox: Outbox, metadata: Any
) -> None:
    record(recorder, states.FAILURE, ImageInvalid("no picture"), metadata=metadata)
    assert json.loads(only(outbox).body)["data"]["metadata"] == {}


def test_an_address_that_dns_gives_at_the_end_loses_no_callback(
    recorder: CallbackRecorder, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = socket.getaddrinfo

    def private(host: str, *more: Any, **options: Any) -> Any:
        return stock("10.0.0.8" if host == "hooks.example.com" else host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", private)
    record(recorder, states.SUCCESS, {"text": "llo"}, callback={**CALLBACK, "url": "https://hooks.example.com/"})
    assert only(outbox).url == "https://hooks.example.com/"


def test_results_that_cannot_be_read_raise_one_of_unavailable(
    recorder: CallbackRecorder, app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_up(*_: Any, **__: Any) -> None:
        raise BackendGetMetaError("failed to get meta")

    monkeypatch.setattr(app.backend, "get_task_meta", give_up)
    with pytest.raises(UNAVAILABLE):
        record(recorder, states.SUCCESS, {"text": "llo"}, is_stored=True)


def test_any_exception_has_a_code(recorder: CallbackRecorder, outbox: Outbox) -> None:
    record(recorder, states.FAILURE, KeyError("x"))
    assert json.loads(only(outbox).body)["data"]["error"]["code"] == "internal"


@pytest.mark.parametrize("state", [states.RETRY, states.STARTED, states.PENDING, "REJECTED"])
def test_only_terminal_states_are_recorded(recorder: CallbackRecorder, outbox: Outbox, state: str) -> None:
    record(recorder, state, None)
    assert outbox.listed("pending", 10) == []


def test_only_the_events_that_were_asked_for_are_recorded(recorder: CallbackRecorder, outbox: Outbox) -> None:
    callback = {**CALLBACK, "events": ["job.failed"]}
    record(recorder, states.SUCCESS, {"text": "llo"}, callback=callback)
    assert outbox.listed("pending", 10) == []
    record(recorder, states.FAILURE, ImageInvalid("no picture"), callback=callback)
    assert only(outbox).event == "job.failed"


@pytest.mark.parametrize(
    "callback",
    [
        None,
        {},
        "https://example.com/",
        {**CALLBACK, "key_id": "other"},
        {**CALLBACK, "url": "https://10.0.0.8/"},
        {**CALLBACK, "url": "http://93.184.216.34/"},
        {**CALLBACK, "secret": "x"},
    ],
)
def test_a_refused_callback_is_not_recorded(recorder: CallbackRecorder, outbox: Outbox, callback: Any) -> None:
    record(recorder, states.FAILURE, ImageInvalid("no picture"), callback=callback)
    assert outbox.listed("pending", 10) == []


def test_the_stored_terminal_state_is_recorded(recorder: CallbackRecorder, outbox: Outbox, app: Celery) -> None:
    """A cancellation that came when the answer was already there."""
    app.backend.store_result("job-1", {"text": "llo"}, states.SUCCESS)
    record(recorder, states.REVOKED, None, is_stored=True)
    assert only(outbox).event == "job.succeeded"
    record(recorder, states.SUCCESS, None, is_stored=True)
    assert json.loads(only(outbox).body)["data"]["result"] == {"text": "llo"}


def test_a_stored_failure_has_its_code(recorder: CallbackRecorder, outbox: Outbox, app: Celery) -> None:
    app.backend.store_result("job-1", ImageInvalid("no picture"), states.FAILURE)
    record(recorder, states.SUCCESS, None, is_stored=True)
    assert json.loads(only(outbox).body)["data"]["error"] == {"code": "image_invalid", "message": "no picture"}


def test_the_stored_state_of_another_submission_under_the_id_is_ignored(
    recorder: CallbackRecorder, outbox: Outbox, app: Celery
) -> None:
    record = {"status": "SUCCESS", DIGEST: "b", "result": {"text": "b's"}, "date_done": "2026-01-02T03:04:05+00:00"}
    app.backend.set(app.backend.get_key_for_task("job-1"), app.backend.encode(record))
    for digest, text in (("a", "a's"), ("b", "b's")):
        recorder.record(
            "job-1", "idefics.complete", ARGUMENTS, (states.SUCCESS, {"text": text}), is_stored=True, digest=digest
        )
    # Two ends, and so two deliveries.
    texts = [json.loads(found.body)["data"]["result"]["text"] for found in outbox.listed("pending", 10)]
    assert sorted(texts) == ["a's", "b's"]


def test_in_a_batch_window_the_first_attempt_waits(app: Celery, outbox: Outbox) -> None:
    chosen = Settings(callback_keys=f"main={SECRET}", callback_batch_window_s=60)
    record(CallbackRecorder(app, chosen), states.SUCCESS, {"text": "llo"})
    assert outbox.claim(10, 60) == []
    assert only(outbox).job == "job-1"


# The parent's requests: stored, recorded, acknowledged, in this order


def _complete() -> None:
    """Never run."""


class Steps:
    """A message's way, step by step."""

    def __init__(self, app: Celery, recorder: CallbackRecorder, **options: Any) -> None:
        self.taken: list[str] = []
        task = app.task(_complete, name="idefics.complete", acks_late=True, Request=JobRequest, shared=False)
        app.recorder = self
        self._recorder = recorder
        self._app = app
        body = ([], ARGUMENTS, {})
        headers = {"id": "job-1", "task": "idefics.complete", "lang": "py", **options}
        self.request = JobRequest(
            _Message(body, headers), on_ack=self._ack, app=app, task=task, request_dict=headers, decoded=True, body=body
        )

    def record(self, *arguments: Any, **options: Any) -> None:
        self.taken.append(f"recorded after {self._app.AsyncResult('job-1').state}")
        self._recorder.record(*arguments, **options)

    def _ack(self, *_: Any) -> None:
        self.taken.append("acknowledged")


class _Message:
    channel = None

    def __init__(self, body: Any, headers: dict[str, Any]) -> None:
        self.body = self.payload = body
        self.headers = headers
        self.properties: dict[str, Any] = {}
        self.delivery_info: dict[str, Any] = {}
        self.content_type, self.content_encoding = "application/json", "utf-8"
        self.acknowledged = False


def test_a_failure_from_the_pool_is_stored_and_recorded_before_it_is_acknowledged(
    app: Celery, recorder: CallbackRecorder, outbox: Outbox
) -> None:
    steps = Steps(app, recorder)
    steps.request.on_failure(exception_info(DeadlineExceeded("too long")))
    assert steps.taken == ["recorded after FAILURE", "acknowledged"]
    assert json.loads(only(outbox).body)["data"]["error"] == {"code": "deadline_exceeded", "message": "too long"}


def test_a_failure_without_a_stored_result_is_recorded_too(
    app: Celery, recorder: CallbackRecorder, outbox: Outbox
) -> None:
    steps = Steps(app, recorder, ignore_result=True)
    steps.request.on_failure(exception_info(DeadlineExceeded("too long")))
    assert steps.taken == ["recorded after PENDING", "acknowledged"]
    assert only(outbox).event == "job.failed"


def test_a_cancellation_is_recorded_before_it_is_acknowledged(
    app: Celery, recorder: CallbackRecorder, outbox: Outbox
) -> None:
    steps = Steps(app, recorder)
    steps.request.on_failure(exception_info(Terminated("canceled")))
    assert steps.taken == ["recorded after REVOKED", "acknowledged"]
    assert only(outbox).event == "job.canceled"


def test_a_failure_that_the_job_thread_recorded_is_only_acknowledged(
    app: Celery, recorder: CallbackRecorder, outbox: Outbox
) -> None:
    """The job's thread has recorded it."""
    steps = Steps(app, recorder)
    told: ExceptionInfo = exception_info(ImageInvalid("no picture"))
    steps.request.on_failure(told, return_ok=True)
    assert steps.taken == ["acknowledged"]
    assert outbox.listed("pending", 10) == []


def test_a_job_whose_callback_cannot_be_recorded_is_not_acknowledged(
    app: Celery, recorder: CallbackRecorder, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> bool:
        raise redis.ConnectionError

    monkeypatch.setattr(Outbox, "add", away)
    steps = Steps(app, recorder)
    steps.request.on_failure(exception_info(DeadlineExceeded("too long")))
    assert steps.taken == ["recorded after FAILURE"]
