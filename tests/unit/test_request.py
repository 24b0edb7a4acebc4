"""When a job's message is acknowledged, and which ones are none of Celery's."""

from __future__ import annotations

import json
from typing import Any
from unittest.mock import Mock

import pytest
from celery.exceptions import Ignore, Reject
from celery.signals import task_failure
from celery.worker.request import Request

from tasks.errors import WorkerLost
from worker.app import app
from worker.pool.request import JobRequest
from worker.runtime.exception_info import exception_info


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What became of the job, in order."""
    told: list[str] = []
    backend = app.tasks["idefics.complete"].backend
    monkeypatch.setattr(backend, "mark_as_failure", lambda *_, **__: told.append("stored"))
    # The list of failed jobs needs a Redis.
    monkeypatch.setattr(task_failure, "send", lambda **_: None)
    return told


@pytest.fixture
def request_(told: list[str]) -> Request:
    return request_of(told, {})


def request_of(told: list[str], embed: Any, **headers: Any) -> JobRequest:
    body = [[], {}, embed]
    message = Mock(
        headers={"id": "1", "task": "idefics.complete", **headers},
        body=json.dumps(body).encode(),
        content_type="application/json",
        content_encoding="utf-8",
        payload=body,
        delivery_info={},
        properties={},
    )
    return JobRequest(
        message,
        app=app,
        task=app.tasks["idefics.complete"],
        on_ack=lambda *_: told.append("acknowledged"),
        on_reject=lambda _, __, requeue: told.append(f"rejected, {requeue}"),
        decoded=True,
        body=body,
        headers=message.headers,
    )


def test_a_failure_is_stored_before_its_message_is_acknowledged(request_: Request, told: list[str]) -> None:
    request_.on_failure(exception_info(WorkerLost()))
    assert told == ["stored", "acknowledged"]


def test_a_failure_that_cannot_be_stored_leaves_its_message_for_the_queue(
    request_: Request, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError

    monkeypatch.setattr(request_.task.backend, "mark_as_failure", refuse)
    with pytest.raises(ConnectionError):
        request_.on_failure(exception_info(WorkerLost()))
    assert told == []
    request_.on_failure(exception_info(Reject("later", requeue=True)))
    assert told == ["rejected, True"]


def test_a_job_without_a_stored_result_is_acknowledged(request_: Request, told: list[str]) -> None:
    request_.on_failure(exception_info(Ignore()))
    assert told == ["acknowledged"]
