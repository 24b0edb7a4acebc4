"""What a client sends."""

from __future__ import annotations

import time

import pytest

from tasks import Client
from tasks.payloads import Job, parse
from tasks.protocol import DEFAULT_PRIORITY, QUEUE, SUBMITTED_AT
from tests.unit.client.messages import JOB, SIGNED, only, received


def test_a_job_is_its_tasks_name_and_its_arguments_as_json(client: Client) -> None:
    submitted = client.submit(JOB)
    message = only(client)
    args, kwargs, _ = message.decode()
    assert message.content_type == "application/json"
    assert (message.headers["task"], message.headers["id"]) == ("idefics.caption", submitted.id)
    assert args == []
    assert kwargs == {"image": SIGNED, "prompt": "This is an image of", "metadata": {"row": 7}}
    assert parse("idefics.caption", kwargs) == JOB


def test_a_job_goes_to_the_workers_queue_unless_told_otherwise(client: Client) -> None:
    client.submit(JOB, queue=f"{client.queue}.slow")
    assert received(client) == []
    assert only(client, f"{client.queue}.slow").headers["task"] == "idefics.caption"
    Client(app=client.app).submit(JOB)
    assert only(client, QUEUE).delivery_info["routing_key"] == QUEUE == "idefics"


@pytest.mark.parametrize(("options", "priority"), [({}, DEFAULT_PRIORITY), ({"priority": 0}, 0), ({"priority": 9}, 9)])
def test_a_job_has_a_priority(client: Client, options: dict[str, int], priority: int) -> None:
    client.submit(JOB, **options)
    assert only(client).properties["priority"] == priority


def test_a_job_carries_its_time_of_submission_beside_the_producers_headers(client: Client) -> None:
    before = time.time()
    client.submit(JOB, headers={"trace": "abc"})
    headers = only(client).headers
    assert before <= headers[SUBMITTED_AT] <= time.time()
    assert headers["trace"] == "abc"


def test_what_monitors_see_has_no_prompt_and_no_signed_url(client: Client) -> None:
    client.submit(JOB)
    message = only(client)
    assert (message.headers["argsrepr"], message.headers["kwargsrepr"]) == ("()", "{...}")
    assert "s3cr3t" not in repr(message.headers) + repr(message.properties)


def test_celerys_own_options_go_along(client: Client) -> None:
    client.submit(JOB, task_id="row-7", expires=60)
    headers = only(client).headers
    assert headers["id"] == "row-7"
    assert headers["expires"]


def test_many_jobs_arrive_in_order(client: Client) -> None:
    jobs: list[Job] = [parse("idefics.complete", {"prompt": [str(number)]}) for number in range(20)]
    submitted = client.submit_many(iter(jobs), priority=3)
    messages = received(client)
    assert [message.headers["id"] for message in messages] == [job.id for job in submitted]
    assert [parse("idefics.complete", message.decode()[1]) for message in messages] == jobs
    assert {message.properties["priority"] for message in messages} == {3}


def test_jobs_of_many_kinds_go_together(client: Client) -> None:
    client.submit_many([JOB, parse("idefics.chat", {"messages": [{"role": "user", "content": "Hello"}]})])
    assert [message.headers["task"] for message in received(client)] == ["idefics.caption", "idefics.chat"]
