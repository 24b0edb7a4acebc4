"""What a client reads of jobs."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis
from celery import states
from celery.exceptions import TaskRevokedError
from kombu.exceptions import OperationalError

from tasks import Client, ImageBlocked, Internal, JobCanceled, JobTimeout, result_wait
from tasks.testing import canned
from tests.unit.client.messages import JOB, away, end, received


def test_an_unknown_id_is_starting(client: Client) -> None:
    assert client.job("nobody").status == "starting"


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (states.RECEIVED, "starting"),
        (states.STARTED, "processing"),
        (states.RETRY, "processing"),
        ("DECODING", "processing"),
        (states.SUCCESS, "succeeded"),
    ],
)
def test_celerys_states_have_replicates_names(client: Client, id: str, state: str, status: str) -> None:
    end(client, id, None, state)
    assert client.job(id).status == status


def test_a_stored_result_is_read_as_a_result(client: Client) -> None:
    expected = canned("the Eiffel Tower", JOB)
    submitted = client.submit(JOB)
    end(client, submitted.id, expected.model_dump(mode="json"), states.SUCCESS)
    assert submitted.result(timeout=1) == expected
    assert client.result(submitted.id, timeout=1) == expected


def test_a_failed_job_raises_our_error(client: Client, id: str) -> None:
    end(client, id, ImageBlocked("Use another."), states.FAILURE)
    with pytest.raises(ImageBlocked, match=r"Use another\."):
        client.result(id, timeout=1)
    assert client.job(id).status == "failed"


def test_a_job_that_failed_with_a_foreign_error_is_internal(client: Client, id: str) -> None:
    end(client, id, ValueError("boom"), states.FAILURE)
    with pytest.raises(Internal, match="ValueError"):
        client.result(id, timeout=1)


def test_a_canceled_job_says_so(client: Client, id: str) -> None:
    client.app.backend.mark_as_revoked(id, "terminated")
    assert client.job(id).status == "canceled"
    with pytest.raises(JobCanceled) as canceled:
        client.result(id, timeout=1)
    assert canceled.value.partial is None


def test_a_canceled_job_has_its_text_so_far(client: Client, id: str) -> None:
    partial = canned("the Eiffel", JOB)
    end(client, id, TaskRevokedError("terminated", partial.model_dump(mode="json")), states.REVOKED)
    with pytest.raises(JobCanceled) as canceled:
        client.result(id, timeout=1)
    assert canceled.value.partial == partial


def test_a_cancellation_that_reached_no_worker_raises(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OperationalError("no permissions")

    monkeypatch.setattr(client.app.control, "revoke", refuse)
    with pytest.raises(OperationalError):
        client.cancel("row-7")


def test_a_job_without_an_answer_in_time_raises_the_builtin_timeout(client: Client) -> None:
    with pytest.raises(TimeoutError, match="worker"):
        client.submit(JOB).result(timeout=0.01)


def test_a_wait_outlasts_a_restart_of_redis(client: Client, id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    end(client, id, canned("an answer", JOB).model_dump(mode="json"), states.SUCCESS)
    away(client, 3, monkeypatch)
    assert client.result(id, timeout=5).text == "an answer"


def test_a_redis_that_stays_away_ends_a_wait(client: Client, id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_wait, "AWAY_S", 0.05)
    away(client, math.inf, monkeypatch)
    with pytest.raises(redis.ConnectionError):
        client.result(id)


def test_many_wait_in_asyncio_without_a_thread_each(client: Client) -> None:
    async def story() -> list[BaseException | Any]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        jobs = [client.job(uuid.uuid4().hex) for _ in range(20)]
        return await asyncio.gather(*(job.aresult(timeout=0.3) for job in jobs), return_exceptions=True)

    began = time.monotonic()
    assert {type(outcome) for outcome in asyncio.run(story())} == {JobTimeout}
    assert time.monotonic() - began < 3


def test_canceling_tells_every_worker_to_end_the_job(client: Client) -> None:
    mailbox = client.app.control.mailbox
    with client.app.connection_for_write() as connection:
        inbox = mailbox.get_queue("worker")(connection.default_channel)
        inbox.declare()
        client.cancel("row-7")
        message = inbox.get(accept=["json"])
    assert message is not None
    assert message.payload["method"] == "revoke"
    assert message.payload["arguments"]["task_id"] == "row-7"
    assert message.payload["arguments"]["terminate"] is True


def test_asyncio_submits_and_waits(client: Client) -> None:
    expected = canned("an answer", JOB)

    async def story() -> None:
        one = await client.asubmit(JOB, priority=1)
        two, three = await client.asubmit_many(iter([JOB, JOB]))
        for job in (one, two, three):
            end(client, job.id, expected.model_dump(mode="json"), states.SUCCESS)
        assert await one.aresult(timeout=1) == expected
        assert await client.aresult(three.id, timeout=1) == expected

    asyncio.run(story())
    assert [message.properties["priority"] for message in received(client)] == [1, 5, 5]
