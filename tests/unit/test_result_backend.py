"""A job's first end is its last, on a real server: what our backend writes, and what Celery's plain one reads."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery, chord
from celery.app.task import Context
from kombu.exceptions import OperationalError

from tasks.errors import InvalidRequest
from tasks.failed import forget
from tasks.protocol import CONTINUES
from tasks.redis_keys import CANCELLATION
from worker.demo import stack
from worker.queue import redis_retry
from worker.queue.redis_retry import RetryingRedis
from worker.queue.result_backend import CANCELED, DIGEST, TAKEN, TAKEN_AT, ResultBackend, Submission, digest_of

ENDS = ("SUCCESS", "FAILURE", "REVOKED")
ERROR = InvalidRequest("no")


def app(broker: stack.Broker, backend: str) -> Celery:
    made = Celery("ends", broker=broker.url, backend=backend, set_as_current=False)
    made.conf.update(
        result_extended=True, result_backend_thread_safe=True, result_expires=60, result_backend_always_retry=True
    )
    return made


@pytest.fixture
def backend(broker: stack.Broker) -> Iterator[ResultBackend]:
    made = app(broker, f"worker.queue.result_backend:ResultBackend+{broker.results}")
    yield made.backend
    made.close()


@pytest.fixture
def plain(broker: stack.Broker) -> Iterator[Any]:
    """Celery's own, which producers have."""
    made = app(broker, broker.results)
    yield made.backend
    made.close()


@pytest.fixture
def id() -> str:
    return uuid.uuid4().hex


def end(backend: Any, id: str, state: str, request: Context | None = None) -> None:
    backend.store_result(id, {"text": "a cat"} if state == "SUCCESS" else ERROR, state, request=request)


# One end


@pytest.mark.parametrize("first", ENDS)
@pytest.mark.parametrize("second", ENDS)
def test_the_first_terminal_state_wins(backend: Any, plain: Any, id: str, first: str, second: str) -> None:
    end(backend, id, first)
    kept = plain.get_task_meta(id, cache=False)
    end(backend, id, second)
    assert plain.get_task_meta(id, cache=False)["date_done"] == kept["date_done"]
    assert plain.get_state(id) == backend.terminal_state(id) == first


@pytest.mark.parametrize("first", ENDS)
@pytest.mark.parametrize("later", ["STARTED", "RETRY"])
def test_a_terminal_state_is_not_overwritten_by_a_later_state(
    backend: Any, plain: Any, id: str, first: str, later: str
) -> None:
    end(backend, id, first)
    backend.store_result(id, None, later)
    assert plain.get_state(id) == first


def test_a_job_without_an_end_goes_from_state_to_state(backend: Any, plain: Any, id: str) -> None:
    assert backend.terminal_state(id) is None
    for state in ("STARTED", "RETRY", "STARTED", "SUCCESS"):
        assert backend.terminal_state(id) is None
        backend.store_result(id, None, state)
        assert plain.get_state(id) == state


# A start


def request_of(id: str) -> Context:
    return Context({"id": id, "hostname": "worker@host"})


def test_a_job_that_starts_is_told_so(backend: Any, plain: Any, id: str) -> None:
    assert backend.start(request_of(id), is_stored=True) is None
    assert plain.get_state(id) == "STARTED"
    assert plain.get_result(id) == {"pid": os.getpid(), "hostname": "worker@host"}
    assert 0 < backend.client.ttl(backend.get_key_for_task(id)) <= 60


@pytest.mark.parametrize("is_stored", [True, False])
def test_a_canceled_job_does_not_start(backend: Any, plain: Any, id: str, is_stored: bool) -> None:
    backend.client.set(CANCELLATION.named(id), 1, ex=60)
    assert backend.start(request_of(id), is_stored=is_stored) == CANCELED
    assert plain.get_state(id) == "PENDING"


@pytest.mark.parametrize("is_stored", [True, False])
@pytest.mark.parametrize("first", ENDS)
def test_a_job_that_has_ended_does_not_start(backend: Any, plain: Any, id: str, first: str, is_stored: bool) -> None:
    end(backend, id, first)
    backend.client.set(CANCELLATION.named(id), 1, ex=60)
    assert backend.start(request_of(id), is_stored=is_stored) == first
    assert plain.get_state(id) == first


def test_the_start_of_a_job_without_results_leaves_nothing(backend: Any, id: str) -> None:
    assert backend.start(request_of(id), is_stored=False) is None
    assert not backend.client.exists(backend.get_key_for_task(id))


def test_of_many_runs_that_end_at_once_one_result_is_kept(
    backend: Any, plain: Any, id: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend.store_result(id, None, "STARTED")
    with caplog.at_level(logging.INFO, "worker.queue.result_backend"), ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: end(backend, id, ENDS[number % 3]), range(48)))
    state = plain.get_state(id)
    assert state in ENDS
    assert len(caplog.messages) == 47
    assert all(f"Job {id} has ended as {state} already: this run's" in message for message in caplog.messages)


def test_a_terminal_state_written_by_celerys_own_backend_wins_too(backend: Any, plain: Any, id: str) -> None:
    end(plain, id, "FAILURE")
    end(backend, id, "SUCCESS")
    assert backend.terminal_state(id) == plain.get_state(id) == "FAILURE"


def test_an_answers_text_is_not_taken_for_its_state(backend: Any, plain: Any, id: str) -> None:
    backend.store_result(id, '{"status": "SUCCESS"', "PROGRESS")
    assert backend.terminal_state(id) is None
    end(backend, id, "FAILURE")
    assert plain.get_state(id) == "FAILURE"


def test_producers_read_what_is_stored(backend: Any, plain: Any, id: str, broker: stack.Broker) -> None:
    request = Context(id=id, task="idefics.caption", hostname="here", retries=1, kwargs={"image": "u"}, children=[])
    end(backend, id, "SUCCESS", request)
    meta = plain.get_task_meta(id)
    assert (meta["status"], meta["result"], meta["task_id"]) == ("SUCCESS", {"text": "a cat"}, id)
    assert (meta["name"], meta["worker"], meta["retries"]) == ("idefics.caption", "here", 1)
    assert 0 < broker.connect(1).ttl(f"celery-task-meta-{id}") <= 60


def test_a_waiting_producer_hears_of_the_end(backend: Any, id: str, broker: stack.Broker) -> None:
    listener = broker.connect(1).pubsub(ignore_subscribe_messages=True)
    listener.subscribe(f"celery-task-meta-{id}")
    listener.get_message(timeout=5)
    end(backend, id, "SUCCESS")
    message = listener.get_message(timeout=5)
    assert message is not None
    assert b'"status": "SUCCESS"' in message["data"]
    end(backend, id, "FAILURE")
    assert listener.get_message(timeout=0.1) is None


def test_a_worker_subscribes_to_no_result_of_the_links_that_it_sends(
    backend: Any, id: str, broker: stack.Broker
) -> None:
    backend.app.send_task("shop.keep", task_id=id, queue=id)
    ((_, listeners),) = broker.connect(1).pubsub_numsub(f"celery-task-meta-{id}")
    assert listeners == 0


def test_a_unix_sockets_url_reaches_its_server(tmp_path: Path, id: str) -> None:
    socket = str(tmp_path / "redis.sock")
    with stack.broker("--unixsocket", socket) as server:
        made = app(server, f"worker.queue.result_backend:ResultBackend+socket://{socket}?virtual_host=1")
        end(made.backend, id, "SUCCESS")
        assert server.connect(1).exists(f"celery-task-meta-{id}")


# A connection that breaks


def test_a_repeated_attempt_is_not_taken_for_another_run(
    backend: Any, id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script has run, and the connection broke before it said so."""
    once, attempts = RetryingRedis._execute_once, []

    def breaking(self: RetryingRedis, *args: Any) -> Any:
        attempts.append(once(self, *args))
        if len(attempts) == 1:
            raise redis.ConnectionError("gone")
        return attempts[-1]

    # The server knows the script.
    backend.start(Context(id=id), is_stored=False)
    monkeypatch.setattr(redis_retry._waiting, "max_wait_s", 10.0)
    monkeypatch.setattr(RetryingRedis, "_execute_once", breaking)
    request = Context(id=id, chord="a chord", errbacks=["an errback"])
    end(backend, id, "FAILURE", request)
    assert attempts == [None, None]
    assert (request.chord, request.errbacks) == ("a chord", ["an errback"])


# Keys that hold something else


def test_a_record_of_another_type_is_written_over(backend: Any, plain: Any, id: str, broker: stack.Broker) -> None:
    broker.connect(1).lpush(f"celery-task-meta-{id}", "no record")
    assert backend.terminal_state(id) is None
    assert backend.start(Context(id=id), is_stored=True) is None
    end(backend, id, "SUCCESS")
    assert plain.get_result(id) == {"text": "a cat"}


def test_a_chord_whose_keys_hold_something_else_loses_a_part_and_its_job_ends(
    backend: Any, plain: Any, id: str, broker: stack.Broker, caplog: pytest.LogCaptureFixture
) -> None:
    group = uuid.uuid4().hex
    broker.connect(1).lpush(f"celery-taskset-meta-{group}.j", "no part")
    body = backend.app.signature("shop.join", task_id=uuid.uuid4().hex)
    request = Context(id=id, group=group, group_index=0, chord=body)
    backend.mark_as_done(id, {"text": "a cat"}, request)
    assert plain.get_result(id) == {"text": "a cat"}
    assert f"Job {id} is left out of its chord {group}" in caplog.text


def test_a_failure_around_a_task_has_a_code(backend: Any, plain: Any, id: str) -> None:
    backend.mark_as_failure(id, OperationalError("a link's"), request=Context(id=id))
    assert plain.get_result(id).args[0] == "internal"


# What follows an end


def test_a_later_run_calls_no_errback_and_fails_no_chain(backend: Any, id: str, broker: stack.Broker) -> None:
    queue, rest = uuid.uuid4().hex, uuid.uuid4().hex
    errback = backend.app.signature("elsewhere.errback", queue=queue)

    def fail() -> None:
        later = backend.app.signature("shop.shout", task_id=rest)
        request = Context(id=id, errbacks=[errback], chain=[later], delivery_info={})
        backend.mark_as_failure(id, ERROR, request=request)

    fail()
    assert (broker.connect().llen(queue), backend.terminal_state(rest)) == (1, "FAILURE")
    backend.forget(rest)
    fail()
    assert (broker.connect().llen(queue), backend.terminal_state(rest)) == (1, None)


def test_a_chord_counts_a_job_once_however_often_its_end_is_repeated(
    backend: Any, id: str, broker: stack.Broker
) -> None:
    queue, group = uuid.uuid4().hex, uuid.uuid4().hex
    body = backend.app.signature("shop.join", queue=queue)
    request = Context(id=id, group=group, group_index=0, chord=body)
    backend.set_chord_size(group, 2)
    other = Context(id=uuid.uuid4().hex, group=group, group_index=1, chord=body)
    # Its worker was killed here, before it told the chord.
    end(backend, id, "SUCCESS", request)
    backend.replay_side_effects(request)
    backend.replay_side_effects(request)
    assert broker.connect().llen(queue) == 0
    backend.mark_as_done(other.id, {"text": "a dog"}, other)
    assert broker.connect().llen(queue) == 1
    backend.replay_side_effects(request)
    assert broker.connect().llen(queue) == 1


def test_a_repeated_failure_fails_what_its_chain_still_waits_for(backend: Any, id: str) -> None:
    rest = uuid.uuid4().hex
    end(backend, id, "FAILURE")
    backend.replay_side_effects(Context(id=id, chain=[backend.app.signature("shop.shout", task_id=rest)]))
    assert backend.terminal_state(rest) == "FAILURE"


# Again under the same id


@pytest.mark.parametrize("forgetting", ["backend", "plain"])
def test_after_a_result_is_forgotten_another_can_be_stored(
    backend: Any, plain: Any, id: str, forgetting: str, request: pytest.FixtureRequest
) -> None:
    """Also those of the rest of its chain, which its failure took along."""
    link, body = uuid.uuid4().hex, uuid.uuid4().hex
    last = chord([backend.app.signature("a.b")], backend.app.signature("shop.join", task_id=body), app=backend.app)
    failed = backend.app.signature(
        "idefics.caption", task_id=id, chain=[dict(last), dict(backend.app.signature("shop.shout", task_id=link))]
    )
    for ended in (id, link, body):
        end(backend, ended, "FAILURE")
    forget(request.getfixturevalue(forgetting), dict(failed))
    for ended in (id, link, body):
        assert backend.terminal_state(ended) is None
        end(backend, ended, "SUCCESS")
        assert plain.get_state(ended) == "SUCCESS"


def test_a_jobs_end_deletes_its_cancellation_key(backend: Any, id: str, broker: stack.Broker) -> None:
    results = broker.connect(1)
    results.set(CANCELLATION.named(id), 1, ex=60)
    backend.store_result(id, None, "STARTED")
    assert results.exists(CANCELLATION.named(id))
    end(backend, id, "REVOKED")
    assert not results.exists(CANCELLATION.named(id))


# A task id that is used again


def asking(id: str, text: str, **more: Any) -> Context:
    delivery = {TAKEN_AT: more.pop("taken", None)}
    more = {**more, "hostname": "a@b", "delivery_info": delivery}
    return Context(id=id, task="idefics.complete", args=[], kwargs={"prompt": [text]}, **more)


def ran(backend: Any, request: Context, state: str = "SUCCESS") -> None:
    assert backend.start(request, is_stored=True) is None
    end(backend, request.id, state, request)


@pytest.mark.parametrize("first", ENDS)
@pytest.mark.parametrize("is_stored", [True, False])
def test_an_id_used_again_for_another_payload_starts_over(
    backend: Any, plain: Any, id: str, first: str, is_stored: bool
) -> None:
    ran(backend, asking(id, "one"), first)
    assert backend.start(asking(id, "two"), is_stored=is_stored) is None
    assert plain.get_state(id) == ("STARTED" if is_stored else "PENDING")
    ran(backend, asking(id, "three"))
    assert plain.get_task_meta(id, cache=False)["result"] == {"text": "a cat"}


@pytest.mark.parametrize("first", ENDS)
def test_an_id_used_again_for_the_same_payload_has_ended(backend: Any, plain: Any, id: str, first: str) -> None:
    ran(backend, asking(id, "one"), first)
    told = plain.get_task_meta(id, cache=False)["date_done"]
    assert backend.start(asking(id, "one", retries=1, headers={"a": 1}), is_stored=True) == first
    assert plain.get_task_meta(id, cache=False)["date_done"] == told


def test_a_run_that_wakes_up_does_not_end_what_was_submitted_since(backend: Any, plain: Any, id: str) -> None:
    old, new = asking(id, "one", chain=[{}], errbacks=[{}]), asking(id, "two")
    assert backend.start(old, is_stored=True) is None
    assert backend.start(new, is_stored=True) is None
    end(backend, id, "FAILURE", old)
    # It ends for those who wait for itself.
    assert (old.chain, old.errbacks) == ([{}], [{}])
    assert plain.get_state(id) == "STARTED"
    end(backend, id, "SUCCESS", new)
    end(backend, id, "FAILURE", old)
    assert plain.get_state(id) == "SUCCESS"
    assert (backend.terminal_state(id, old.submission), backend.terminal_state(id, new.submission)) == (None, "SUCCESS")


@pytest.mark.parametrize("first", ENDS)
@pytest.mark.parametrize("has_ended", [True, False])
def test_a_record_belongs_to_the_submission_that_was_reserved_last(
    backend: Any, plain: Any, id: str, first: str, has_ended: bool
) -> None:
    earlier, later = (asking(id, text, taken=at) for text, at in (("one", 1e9), ("two", 1e9 + 1e-5)))
    assert backend.start(later, is_stored=True) is None
    if has_ended:
        end(backend, id, first, later)
    # Another worker had it for longer before it began.
    assert backend.start(earlier, is_stored=True) is None
    assert plain.get_state(id) == (first if has_ended else "STARTED")
    end(backend, id, "SUCCESS", earlier)
    end(backend, id, first, later)
    assert plain.get_state(id) == first
    assert plain.get_task_meta(id, cache=False)[DIGEST] == later.submission.digest


def test_an_old_result_counts_for_a_later_submission_of_the_same_payload(backend: Any, plain: Any, id: str) -> None:
    ran(backend, asking(id, "one", taken=1e9))
    told = plain.get_task_meta(id, cache=False)
    between, again = (asking(id, text, taken=1e9 + at) for text, at in (("two", 1), ("one", 2)))
    assert backend.start(again, is_stored=True) == "SUCCESS"
    assert plain.get_task_meta(id, cache=False) == {**told, TAKEN: "1000000002.000000"}
    assert 0 < backend.client.ttl(backend.get_key_for_task(id)) <= 60
    ran(backend, between)
    assert plain.get_task_meta(id, cache=False)["date_done"] == told["date_done"]


@pytest.mark.parametrize("again", [{"retries": 1}, {CONTINUES: True}])
def test_a_retry_never_overwrites_the_record_of_another_submission(
    backend: Any, plain: Any, id: str, again: dict[str, Any]
) -> None:
    assert backend.start(asking(id, "one", taken=1e9), is_stored=True) is None
    ran(backend, asking(id, "two", taken=1e9 + 1))
    retry = asking(id, "one", taken=1e9 + 2, **again)
    assert backend.start(retry, is_stored=True) is None
    end(backend, id, "FAILURE", retry)
    assert plain.get_state(id) == "SUCCESS"


def test_a_submission_reserved_by_a_clock_hours_ahead_blocks_no_other(backend: Any, plain: Any, id: str) -> None:
    ran(backend, asking(id, "one", taken=1e9 + 7_200))
    ran(backend, asking(id, "two", taken=1e9), "REVOKED")
    assert plain.get_state(id) == "REVOKED"


def test_a_job_that_ends_before_it_has_begun_counts_under_a_used_id(backend: Any, plain: Any, id: str) -> None:
    ran(backend, asking(id, "one"))
    expired = asking(id, "two")
    expired.submission = Submission(digest_of("idefics.complete", [], {"prompt": ["two"]}), begins=True)
    end(backend, id, "REVOKED", expired)
    assert plain.get_state(id) == "REVOKED"
    end(backend, id, "FAILURE", expired)
    assert plain.get_state(id) == "REVOKED"


def test_a_record_without_a_digest_is_the_same_jobs(backend: Any, plain: Any, id: str) -> None:
    end(plain, id, "SUCCESS")
    assert backend.start(asking(id, "two"), is_stored=True) == "SUCCESS"


def test_a_header_of_the_message_is_no_digest(backend: Any, id: str, broker: stack.Broker) -> None:
    end(backend, id, "SUCCESS", Context(id=id, submission="forged"))
    assert DIGEST.encode() not in (broker.connect(1).get(f"celery-task-meta-{id}") or b"")


def test_an_answers_text_is_not_taken_for_its_digest(backend: Any, id: str) -> None:
    backend.store_result(id, {DIGEST: "0" * 32}, "SUCCESS")
    assert backend.start(asking(id, "two"), is_stored=True) == "SUCCESS"


def test_a_digest_is_of_the_task_and_its_arguments() -> None:
    asked = digest_of("t", [1], {"a": 1, "b": ["x"]})
    assert asked == digest_of("t", (1,), {"b": ("x",), "a": 1})
    assert len({asked, digest_of("u", [1], {"a": 1, "b": ["x"]}), digest_of("t", [], {"a": 1, "b": ["x"]})}) == 3
    assert digest_of("t", [], {"when": datetime(2026, 1, 1), "half": "\ud800"}).isalnum()
