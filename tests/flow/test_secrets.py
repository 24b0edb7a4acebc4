"""Messages from anybody: none ends the worker, and nothing that a job carries shows in a log, an event or a monitor."""

from __future__ import annotations

import base64
import bz2
import json
import lzma
from collections.abc import Iterator
from typing import Any

import pytest
from celery import uuid
from celery.result import AsyncResult

from tests.support.events import Events
from tests.support.gallery import Gallery
from tests.support.messages import task_message
from tests.support.stand import Stand, stand
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack

SECRET = "s3cr3t"
#: The marker, and what a data: URI makes of it.
MARKS = (SECRET, base64.b64encode(f"__{SECRET}".encode()).decode().strip("="))


@pytest.fixture(scope="module", params=[("INFO", "text"), ("DEBUG", "json")], ids="-".join)
def stood(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    log = tmp_path_factory.mktemp("secrets") / "log"
    level, log_format = request.param
    settings = {"LOG_LEVEL": level, "LOG_FORMAT": log_format, "IMAGE_TIMEOUT_S": "5", "MAX_RETRIES": "1"}
    with (
        Gallery().open() as gallery,
        stack.broker() as server,
        stand(server, gallery, log, MAX_JOB_BYTES="20000", **settings) as stood,
    ):
        yield stood


@pytest.fixture(scope="module")
def events(stood: Stand) -> Events:
    return Events(stood.producer.app)


def hidden_jobs(gallery: Gallery) -> list[tuple[str, dict[str, Any]]]:
    """Jobs that succeed or fail in each of their ways, with the marker wherever a producer can put one."""
    picture = f"{gallery.picture('shown')}?token={SECRET}"
    data = "data:image/png;base64," + base64.b64encode(f"__{SECRET}{'_' * 60}".encode()).decode()
    complete = "idefics.complete"
    return [
        (complete, {"prompt": [f"{SECRET} Hello"], "max_new_tokens": 3}),
        (complete, {"prompt": [picture, SECRET], "metadata": {SECRET: SECRET}, "stop": [SECRET]}),
        (complete, {"prompt": [data]}),
        (complete, {"prompt": [f"<image>{SECRET}"]}),
        (complete, {"prompt": [f"{gallery.broken('broken', 9)}?{SECRET}"]}),
        (complete, {"prompt": [SECRET], SECRET: SECRET}),
        (complete, {"prompt": {SECRET: SECRET}}),
        (complete, {"prompt": [{"image": {"path": SECRET}}]}),
        (complete, {"prompt": [f"http://{SECRET}@127.0.0.1/{SECRET}"]}),
        ("idefics.caption", {"image": f"ftp://127.0.0.1/{SECRET}"}),
        ("idefics.caption", {"image": f"http://169.254.169.254/{SECRET}"}),
        ("idefics.classify", {"image": picture, "labels": [SECRET, SECRET]}),
        ("idefics.chat", {"messages": [{"role": SECRET, "content": SECRET}]}),
        (complete, {"prompt": [SECRET], "max_new_tokens": SECRET, "idempotency_key": SECRET}),
        (complete, {"prompt": [SECRET * 5_000]}),
        ("idefics.unknown", {"prompt": [SECRET]}),
    ]


def test_no_content_of_a_foreign_producers_job_is_logged_or_sent_as_an_event(stood: Stand, events: Events) -> None:
    app = stood.producer.app
    sent: list[AsyncResult[Any]] = [
        app.send_task(task, kwargs=arguments, queue="idefics") for task, arguments in hidden_jobs(stood.gallery)
    ]
    sent.append(app.send_task("idefics.complete", args=[SECRET], queue="idefics"))
    outcomes = [outcome.get(timeout=PATIENCE_S, propagate=False) for outcome in sent]
    assert outcomes[0]["text"] == "llo"
    assert not [error for error in outcomes if isinstance(error, Exception) and error.args[0] == "internal"]
    eventually(lambda: all({"task-succeeded", "task-failed"} & events.of(outcome.id) for outcome in sent))
    _hides(stood.log.read_text())
    _hides(json.dumps(events.seen))
    for outcome, answer in zip(sent, outcomes, strict=True):
        record = stood.producer.server.connect(1).get(f"celery-task-meta-{outcome.id}") or b""
        assert json.loads(record).get("kwargs") is None
        if isinstance(answer, Exception):
            _hides(repr(answer) + record.decode())


def test_a_monitor_sees_no_content_of_a_running_job(stood: Stand) -> None:
    job = stood.producer.show(f"{stood.gallery.held('monitored')}?{SECRET}").apply_async()
    stood.gallery.await_requests(f"monitored?{SECRET}")
    (active,) = (stood.producer.app.control.inspect(timeout=1).active() or {}).values()
    assert [task["id"] for task in active] == [job.id]
    _hides(json.dumps(active))
    stood.gallery.release("monitored")
    job.get(timeout=PATIENCE_S)


def _hides(text: str) -> None:
    found = [mark for mark in MARKS if mark in text]
    assert not found, [line for line in text.splitlines() if any(mark in line for mark in found)][:3]


def message(
    headers: dict[str, Any] | None = None,
    body: str = '[[], {"prompt": ["Hello"], "max_new_tokens": 2}, {}]',
    properties: dict[str, Any] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """A task's message as it lies in Redis, with some of it exchanged."""
    task = {"lang": "py", "task": "idefics.complete", "id": uuid(), "retries": 0, "timelimit": [None, None]}
    delivery = {"exchange": "", "routing_key": "idefics"}
    plain = {"delivery_info": delivery, **(properties or {})}
    return task_message({**task, **(headers or {})}, body.encode(), plain, **fields)


def bomb(compression: str, body: bytes) -> dict[str, Any]:
    return {**message({"compression": compression}), "body": base64.b64encode(body).decode()}


BROKEN: dict[str, dict[str, Any]] = {
    "no JSON": message(body=f"{SECRET}{{"),
    "an empty body": message(body=""),
    "a body that is no list": message(body="{}"),
    "a body that is too short": message(body="[1]"),
    "arguments that are none": message(body="[null, null, null]"),
    "keyword arguments that are a list": message(body='[[], ["a"], {}]'),
    "an embed that is none": message(body='[[], {"prompt": ["Hello"], "max_new_tokens": 2}, 7]'),
    "nested beyond all measure": message(body="[" * 9_000 + "]" * 9_000),
    "a number of thousands of digits": message(body='[[], {"seed": ' + "9" * 9_000 + "}, {}]"),
    "pickle": message(body=SECRET, **{"content-type": "application/x-python-serialize"}),
    "yaml": message(body=SECRET, **{"content-type": "application/x-yaml"}),
    "an unknown encoding": message(**{"content-encoding": SECRET}),
    "a body in no base64": {**message(), "body": "%%%" + SECRET},
    "a task that is a list": message({"task": [SECRET]}),
    "a task that is unknown": message({"task": "shop.unknown"}),
    "an id that is a list": message({"id": [SECRET]}),
    "no id": {**message(), "headers": {"task": "idefics.complete"}},
    "no headers": {**message(), "headers": None},
    "headers that are a text": {**message(), "headers": SECRET},
    "retries that are a text": message({"retries": SECRET}),
    "retries below none": message({"retries": -9}),
    "time limits that are texts": message({"timelimit": [SECRET, SECRET]}),
    "one time limit": message({"timelimit": [1]}),
    "an eta that is none": message({"eta": SECRET}),
    "an expiry that is none": message({"expires": {"a": SECRET}}),
    "a priority that is a text": message(properties={"priority": SECRET}),
    "a time of submission that is a text": message({"idefics_submitted_at": SECRET}),
    "a name that is a number": message({"shadow": 7}),
    "another language": message({"lang": SECRET}),
    "compression": message({"compression": "gzip"}, body=SECRET),
    "a bomb": bomb("application/x-bz2", bz2.compress(bytes(2**28))),
    "a bomb behind a small body": bomb("bzip2", bz2.compress(b"[]") + bz2.compress(bytes(2**28))),
    "a bomb of a kind that nobody asked for": bomb("xz", lzma.compress(bytes(2**28))),
    "delivery information that is none": message(properties={"delivery_info": None}),
    "a reply that goes nowhere": message(properties={"reply_to": 7, "correlation_id": {}}),
    "a group that is a number": message({"group": 7, "root_id": [1], "parent_id": {}}),
    "stamps that are a text": message({"stamped_headers": SECRET, "stamps": SECRET}),
}


def test_no_message_of_another_form_ends_the_worker_or_is_repeated_in_its_log(stood: Stand) -> None:
    process, model = stood.process, stood.producer.model_process()
    with stood.producer.server.connect(0) as server:
        for broken in BROKEN.values():
            server.lpush("idefics", json.dumps(broken))
        server.lpush("idefics", SECRET)
        server.lpush("idefics", json.dumps({"body": SECRET}))
        server.lpush("idefics", json.dumps(SECRET))
    assert stood.producer.complete().apply_async().get(timeout=PATIENCE_S)["text"] == "llo"
    eventually(lambda: stood.producer.stats()["pool"]["in-flight"] == 0)
    assert process.poll() is None
    assert stood.producer.model_process() == model
    _hides(stood.log.read_text())
    assert "A defect in" not in stood.log.read_text()


def test_no_message_forges_a_line_of_the_log(stood: Stand) -> None:
    forged = "2026-01-02 03:04:05,678 CRITICAL [1] worker.app: forged"
    hostile = "".join(
        f"{mark}{forged}" for mark in ("\n", "\r", "\x1b[2J", "\x85", "\u2028", "\u202e", "\x9b", "\ud800")
    )
    headers = [{name: f"a{hostile}"} for name in ("id", "shadow", "task", "lang", "root_id", "group", "eta", "expires")]
    already = len(stood.log.read_text())
    with stood.producer.server.connect(0) as server:
        for header in headers:
            for body in ('[[], {"prompt": ["Hello"], "max_new_tokens": 2}, {}]', '[[], {"prompt": 7}, {}]'):
                server.lpush("idefics", json.dumps(message(header, body)))
        server.lpush(
            "idefics", json.dumps(message({"shadow": hostile}, '[[], {"prompt": ["' + "x" * 9_000 + '"]}, {}]'))
        )
    assert stood.producer.complete().apply_async().get(timeout=PATIENCE_S)["text"] == "llo"
    eventually(lambda: stood.producer.stats()["pool"]["in-flight"] == 0)
    lines = stood.log.read_text()[already:].removesuffix("\n").split("\n")
    assert all(line.isprintable() for line in lines), [line for line in lines if not line.isprintable()]
    # A record begins with its time, here and now; what belongs to it is indented.
    starts = ("20", "    ") if lines[0].startswith("20") else ('{"time": "20',)
    assert not [line for line in lines if line.startswith("2026-01-02") or not line.startswith(starts)]


def test_a_message_that_cannot_be_used_ends_its_job_with_the_cure(stood: Stand) -> None:
    names = [
        "no JSON",
        "pickle",
        "a bomb",
        "a bomb of a kind that nobody asked for",
        "keyword arguments that are a list",
        "time limits that are texts",
    ]
    for broken in (*names, "an embed that is none", "stamps that are a text"):
        id = uuid()
        sent = {**BROKEN[broken], "headers": {**BROKEN[broken]["headers"], "id": id}}
        stood.producer.server.connect(0).lpush("idefics", json.dumps(sent))
        error = stood.producer.app.AsyncResult(id).get(timeout=PATIENCE_S, propagate=False)
        assert error.args[0] == "invalid_request", broken
