"""Messages of every form against a real worker: it lives on, each job with an id ends, and nothing goes round."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from celery import chord, group, uuid
from celery.result import AsyncResult

from benchmarks import envelopes
from tasks.payloads import PAYLOADS
from tests.support.gallery import Gallery
from tests.support.messages import task_message
from tests.support.stand import Producer, Stand, stand
from tests.support.waiting import PATIENCE_S, eventually
from worker.app import app
from worker.demo import stack


@pytest.fixture(scope="module")
def stood(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    log = tmp_path_factory.mktemp("envelopes") / "log"
    with Gallery().open() as gallery, stack.broker() as server, stand(server, gallery, log, MODEL="fake") as stood:
        yield stood


@pytest.fixture
def queues(stood: Stand) -> redis.Redis:
    return stood.producer.server.connect(0)


def message(
    id: str, body: Any = None, headers: dict[str, Any] | None = None, task: str = "idefics.complete", **fields: Any
) -> dict[str, Any]:
    """A good message but for what is given. A body of None is a good one's; no id: a message of the first protocol."""
    arguments = [[], {"prompt": ["Hello"], "max_new_tokens": 3}, {}]
    named = {"task": task, "id": id, "lang": "py", "retries": 0, "timelimit": [None, None]} if id else {}
    return task_message({**named, **(headers or {})}, arguments if body is None else body, **fields)


def error_of(producer: Producer, id: str) -> BaseException:
    error = AsyncResult(id, app=producer.app).get(timeout=PATIENCE_S, propagate=False)
    assert isinstance(error, Exception), error
    return error


def answers(stood: Stand) -> None:
    """The worker takes jobs, has none left, and is not busy."""
    assert stood.producer.complete().apply_async().get(timeout=PATIENCE_S)["text"] == "llo"
    eventually(lambda: stood.producer.server.connect(0).hlen("unacked") == 0)
    assert stood.process.poll() is None


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def link(task: str) -> dict[str, Any]:
    return {"task": task, "args": [], "kwargs": {}, "options": {}}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pickle": (
        message("x", pickle.dumps(([], {}, {})), **{"content-type": "application/x-python-serialize"}),
        "pickle is not accepted: send application/json; in Celery set task_serializer='json'",
    ),
    "yaml": (message("x", b"- []", **{"content-type": "application/x-yaml"}), "set task_serializer='json'"),
    "a codec that inflates": (message("x", **{"content-encoding": "zlib_codec"}), "utf-8"),
    "null arguments": (message("x", [None, None, {}]), "keyword arguments"),
    "missing arguments": (message("x", []), "keyword arguments"),
    "a link into kombu's lock": (
        message("x", [[], {}, {"callbacks": [{**link("shop.keep"), "options": {"queue": "unacked_mutex"}}]}]),
        "plain queue",
    ),
    "a link to a built-in": (message("x", [[], {}, {"errbacks": [link("celery.map")]}]), "built-in"),
    "a text of error links": (message("x", [[], {}, {"errbacks": "x" * 3_000}]), "must be a list"),
    "an eta in 2099": (message("x", None, {"eta": "2099-01-01T00:00:00+00:00"}), "eta"),
    "a group that is a list": (message("x", None, {"group": ["a"]}), "group"),
    "a typed value": (message("x", [[], {"a": {"__type__": "decimal", "__value__": "abc"}}, {}]), "__type__"),
    "a header nested 480 deep": (message("x", None, {"a": nested(480)}), "headers"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("length", [36, 900])
def test_a_refused_job_ends_with_the_cure(stood: Stand, queues: redis.Redis, name: str, length: int) -> None:
    sent, cure = REFUSED[name]
    id = uuid().ljust(length, "x")
    queues.lpush("idefics", json.dumps({**sent, "headers": {**sent["headers"], "id": id}}))
    error = error_of(stood.producer, id)
    assert error.args[0] == "invalid_request"
    assert cure in error.args[1]


@pytest.mark.parametrize("arguments", [{"args": None}, {"kwargs": None}, {"eta": "soon"}, {"callbacks": "a text"}])
def test_a_refused_job_of_the_first_protocol_ends(stood: Stand, queues: redis.Redis, arguments: dict[str, Any]) -> None:
    id = uuid()
    body = {"task": "idefics.complete", "id": id, "args": [], "kwargs": {"prompt": ["Hello"]}, **arguments}
    queues.lpush("idefics", json.dumps(message("", body)))
    assert error_of(stood.producer, id).args[0] == "invalid_request"


def test_a_job_of_the_first_protocol_runs(stood: Stand, queues: redis.Redis) -> None:
    id = uuid()
    body = {"task": "idefics.complete", "id": id, "args": [], "kwargs": {"prompt": ["Hello"], "max_new_tokens": 3}}
    queues.lpush("idefics", json.dumps(message("", body)))
    assert AsyncResult(id, app=stood.producer.app).get(timeout=PATIENCE_S)["text"] == "llo"


def test_messages_with_deep_headers_take_no_place_forever(stood: Stand, queues: redis.Redis) -> None:
    ids = [uuid() for _ in range(190)]
    queues.lpush("idefics", *(json.dumps(message(id, None, {"a": nested(480)})) for id in ids))
    for id in ids:
        assert error_of(stood.producer, id).args[0] == "invalid_request"
    answers(stood)


KILLERS = {
    "a typed value in a header": message("", None, {"a": {"__type__": "decimal", "__value__": "abc"}}),
    "an id that is half a character": message("\ud800"),
    "a body that is a number": {**message(""), "body": 2**62},
    "a priority without end": {**message(""), "properties": {"priority": float("inf"), "body_encoding": "base64"}},
}
RAW = [b'{"body": "", "headers": {"a": ' + b"[" * 5_000, b"[" * 5_000, b"garbage", b'{"body": 4611686018427387904}']


def test_one_message_kills_no_worker_and_is_kept(stood: Stand, queues: redis.Redis) -> None:
    failed = stood.producer.server.connect(1)
    failed.delete("idefics:failed", "idefics:failed:about")
    queues.lpush("idefics", *RAW, *map(json.dumps, KILLERS.values()))
    answers(stood)
    kept = [json.loads(about) for about in failed.hvals("idefics:failed:about")]
    assert {about["code"] for about in kept} == {"invalid_request"}
    assert len(kept) == len(RAW) + len(KILLERS)
    assert all(about["id"].startswith("refused-") and about["message"].isprintable() for about in kept)


def test_an_unreadable_record_kills_no_worker(stood: Stand, queues: redis.Redis) -> None:
    for number, record in enumerate([b"[" * 5_000, b"garbage", b'[{"body": ""}, "", "idefics"]']):
        queues.hset("unacked", f"broken-{number}", record)
        queues.zadd("unacked_index", {f"broken-{number}": 1})
    eventually(lambda: queues.zcard("unacked_index") == 0, timeout=120)
    answers(stood)


def test_garbage_in_the_mailbox_and_among_events_kills_no_worker(stood: Stand, queues: redis.Redis) -> None:
    bad = json.dumps({"body": {"__type__": "decimal", "__value__": "abc"}})
    for channel in ("/0.celery.pidbox", "/0.celeryev/worker.heartbeat"):
        for data in (b"[" * 5_000, b"garbage", b"7", b"{}", bad, json.dumps(message("", b"[1]")), b'"text"'):
            queues.publish(channel, data)
    answers(stood)
    assert stood.producer.stats()


def test_an_id_that_is_no_text_fails_no_other_job(stood: Stand, queues: redis.Redis) -> None:
    # What was delivered before is counted under its id.
    again = {"body_encoding": "base64", "delivery_info": {"redelivered": True}}
    queues.lpush("idefics", json.dumps({**message("\ud800"), "properties": {**again, "delivery_tag": "tag"}}))
    jobs = [stood.producer.complete().apply_async() for _ in range(5)]
    assert [job.get(timeout=PATIENCE_S)["text"] for job in jobs] == ["llo"] * 5


def test_a_job_says_that_it_came_from_anywhere_and_its_retries_come_here(stood: Stand, queues: redis.Redis) -> None:
    id = uuid()
    address = f"{stood.gallery.broken('retried', 1)}"
    sent = message(id, [[], {"prompt": [{"image": address}, "Hello"], "max_new_tokens": 3}, {}])
    sent["properties"]["delivery_info"] = {"exchange": "", "routing_key": "elsewhere"}
    queues.lpush("idefics", json.dumps(sent))
    assert AsyncResult(id, app=stood.producer.app).get(timeout=PATIENCE_S)["text"] == "llo"
    assert not queues.exists("elsewhere")


# --- Only our task names run ---


def test_the_workers_registry_holds_the_six_tasks_only() -> None:
    assert sorted(app.tasks) == sorted(PAYLOADS)


@pytest.mark.parametrize("task", ["accumulate", "chord_unlock", "map", "starmap", "chunks", "group", "chain", "chord"])
def test_a_built_in_task_does_not_run(stood: Stand, queues: redis.Redis, task: str) -> None:
    id = uuid()
    queues.lpush("idefics", json.dumps(message(id, [["forged"], {"index": 0}, {}], task=f"celery.{task}")))
    assert error_of(stood.producer, id).args[0] == "invalid_request"


def test_chords_count_their_parts_without_the_built_in_tasks(stood: Stand) -> None:
    producer = stood.producer
    job = producer.complete
    inner = chord([job("ab", immutable=True), job("cd", immutable=True)], job("Hello", immutable=True))
    results = [
        chord([job("ab"), job("cd")], job("Hello", immutable=True)).apply_async(),
        (group(job("ab"), job("cd")) | job("Hello", immutable=True)).apply_async(),
        (job("ab") | group(job("cd", immutable=True), inner) | job("Hello", immutable=True)).apply_async(),
    ]
    assert [result.get(timeout=PATIENCE_S)["text"] for result in results] == ["llo"] * 3


# --- Fuzzed ---


def test_no_fuzzed_envelope_kills_the_worker() -> None:
    found = envelopes.campaign(400, 200)
    assert found["tried"] == 400
    assert {"success", "invalid_request"} <= found["ends"].keys()
    assert "internal" not in found["ends"]
