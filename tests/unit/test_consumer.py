"""What becomes of a job that cannot be taken in or handed over for a defect of ours, with a pool that has them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from celery.exceptions import TaskRevokedError
from redis.exceptions import ConnectionError as RedisConnectionError

from tasks.errors import Internal
from worker.app import app
from worker.queue.consumer import Consumer
from worker.queue.redeliveries import History, RedeliveryCounter


class Job:
    """In the place of Celery's request: it cannot be handed over, and perhaps not ended."""

    id, task_name = "job", "idefics.caption"

    def __init__(self, error: BaseException | None, ends: BaseException | None = None) -> None:
        self._error, self._ends = error, ends
        self.request_dict = {"id": self.id, "retries": 0}
        self.told: list[Any] = []

    def execute_using_pool(self, pool: Any) -> None:
        if self._error:
            raise self._error

    def on_failure(self, info: Any) -> None:
        if self._ends:
            raise self._ends
        self.told.append(getattr(info.exception, "exc", info.exception))

    def reject(self, requeue: bool) -> None:
        self.told.append(f"rejected, {requeue}")


@pytest.fixture
def consumer(monkeypatch: pytest.MonkeyPatch) -> Consumer:
    consumer = Consumer.__new__(Consumer)
    consumer.app, consumer.pool, consumer.hub = app, object(), None
    consumer.controller = SimpleNamespace(_quick_release=Mock())
    consumer.redeliveries = RedeliveryCounter(most=3)
    consumer.redeliveries.count_return = Mock()
    consumer.refusals = Mock()
    monkeypatch.setattr(app, "recorder", Mock())
    consumer.event_dispatcher, consumer.connection_errors, consumer.channel_errors = None, (OSError,), ()
    return consumer


def released(consumer: Consumer) -> int:
    return int(consumer.controller._quick_release.call_count)


@pytest.mark.parametrize(
    "defect", [TypeError(), RecursionError(), MemoryError(), UnicodeEncodeError("utf-8", "", 0, 1, "")]
)
def test_a_job_that_cannot_be_handed_over_ends_as_internal_and_frees_its_place(
    consumer: Consumer, defect: Exception
) -> None:
    job = Job(defect)
    consumer.hand_over(job)
    assert [type(told) for told in job.told] == [Internal]
    assert released(consumer) == 1


def test_a_job_that_is_handed_over_keeps_its_place(consumer: Consumer) -> None:
    job = Job(None)
    consumer.hand_over(job)
    assert (job.told, released(consumer)) == ([], 0)


def test_a_revoked_job_frees_its_place(consumer: Consumer) -> None:
    job = Job(TaskRevokedError())
    consumer.hand_over(job)
    assert (job.told, released(consumer)) == ([], 1)


def test_a_job_goes_back_for_want_of_redis(consumer: Consumer) -> None:
    job = Job(RedisConnectionError())
    consumer.hand_over(job)
    assert (job.told, released(consumer)) == (["rejected, True"], 1)


def test_a_job_whose_end_cannot_be_stored_goes_back_a_few_times(consumer: Consumer) -> None:
    job = Job(TypeError(), ends=ValueError())
    consumer.hand_over(job)
    assert job.told == ["rejected, True"]
    consumer.redeliveries.count_return.assert_called_once_with(("job", 0))
    consumer.redeliveries.history = lambda key: History(returns=3, deaths=3)
    consumer.hand_over(job)
    assert job.told == ["rejected, True", "rejected, False"]
    (id, error), _ = consumer.refusals.end.call_args
    assert (id, type(error)) == ("job", Internal)
    assert released(consumer) == 2


def test_places_are_freed_one_after_the_other(consumer: Consumer) -> None:
    # Each in the other would be too deep for Python.
    consumer.hub = Mock()
    consumer.hand_over(Job(TypeError()))
    assert released(consumer) == 0
    consumer.hub.call_soon.assert_called_once_with(consumer.controller._quick_release)


def message() -> Mock:
    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    return Mock(
        headers={"id": "job", "task": "idefics.complete", "group": "g"},
        body=json.dumps([[], {}, embed]).encode(),
        content_type="application/json",
        content_encoding="utf-8",
        properties={},
    )


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, Any]]:
    ended: list[tuple[str, Any, Any]] = []

    def mark(id: str, error: Exception, request: Any) -> None:
        ended.append((id, type(error), request.group))

    monkeypatch.setattr(app.backend, "mark_as_failure", mark)
    return ended


def handler(consumer: Consumer, monkeypatch: pytest.MonkeyPatch, error: Exception) -> Any:
    def handle(message: Any) -> None:
        raise error

    consumer.task_consumer = SimpleNamespace(channel=SimpleNamespace())
    monkeypatch.setattr("worker.queue.consumer.delay_until_due", lambda message: False)
    monkeypatch.setattr("celery.worker.consumer.Consumer.create_task_handler", lambda self, *_, **__: handle)
    return consumer.create_task_handler()


def test_a_defect_while_a_job_is_received_fails_it_as_internal(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch, ended: list[tuple[str, Any, Any]]
) -> None:
    sent = message()
    handler(consumer, monkeypatch, TypeError())(sent)
    assert ended == [("job", Internal, "g")]
    sent.reject_log_error.assert_called_once()
    assert not sent.reject_log_error.call_args.kwargs.get("requeue")
    consumer.refusals.assert_not_called()


def test_a_lost_connection_is_left_to_celery(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch, ended: list[tuple[str, Any, Any]]
) -> None:
    with pytest.raises(ConnectionError):
        handler(consumer, monkeypatch, ConnectionError())(message())
    assert ended == []


def test_the_decoded_payload_is_kept_no_longer_than_a_request_needs_it(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch, ended: list[tuple[str, Any, Any]]
) -> None:
    sent = message()
    handler(consumer, monkeypatch, TypeError())(sent)
    assert sent._decoded_cache is None
    assert sent._raw is None
