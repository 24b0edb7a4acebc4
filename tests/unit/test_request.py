"""When a job's message is acknowledged, and which ones are none of Celery's."""

from __future__ import annotations

import json
from typing import Any
from unittest.mock import Mock

import pytest
from celery.exceptions import Ignore, InvalidTaskError, Reject
from celery.signals import task_failure
from celery.worker.request import Request

from tasks.errors import WorkerLost
from worker.app import app
from worker.pool.job import exception_info
from worker.pool.request import JobRequest


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


def test_what_is_not_stored_is_acknowledged_all_the_same(request_: Request, told: list[str]) -> None:
    request_.on_failure(exception_info(Ignore()))
    assert told == ["acknowledged"]


@pytest.mark.parametrize("embed", [None, 7, "a text", ["a list"], True])
def test_an_embed_that_is_no_mapping_is_refused(embed: Any, told: list[str]) -> None:
    with pytest.raises(InvalidTaskError):
        request_of(told, embed)


@pytest.mark.parametrize(
    "headers",
    [
        {"stamps": "text"},
        {"stamps": ["a"]},
        {"stamped_headers": "text"},
        {"stamped_headers": 7},
        {"stamped_headers": [{}]},
    ],
)
def test_stamps_of_another_form_than_celerys_are_refused(headers: dict[str, Any], told: list[str]) -> None:
    with pytest.raises(InvalidTaskError):
        request_of(told, {}, **headers)


@pytest.mark.parametrize("headers", [{"timelimit": [1]}, {"timelimit": [1, 2, 3]}, {"_children": [1]}])
def test_headers_that_a_running_job_would_stumble_over_are_refused(headers: dict[str, Any], told: list[str]) -> None:
    with pytest.raises(InvalidTaskError):
        request_of(told, {}, **headers)


def test_an_embed_that_goes_over_the_headers_is_refused(told: list[str]) -> None:
    with pytest.raises(InvalidTaskError):
        request_of(told, {"delivery_info": 7})


def test_stamps_and_an_embed_of_celerys_form_are_taken(told: list[str]) -> None:
    request = request_of(told, {"chord": None}, stamps={"monitoring": "7"}, stamped_headers=["monitoring"])
    assert request.stamps == {"monitoring": "7"}
    assert request_of(told, {}, stamps=None, stamped_headers=None).stamps == {}
