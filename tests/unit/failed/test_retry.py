"""Failed jobs are sent again."""

from __future__ import annotations

import time
from typing import Any

import pytest
from celery import states

from tasks import Client
from tasks.failed import FailedJobs
from tasks.protocol import CAMPAIGN, CONTINUES, SUBMITTED_AT
from tests.unit.failed.kept import URL, WIDE, ids, job, keep, message, signature
from worker.demo.stack import Broker


def test_a_job_is_sent_again_as_it_was(client: Client, jobs: FailedJobs, broker: Broker) -> None:
    link = signature("link")
    headers = {"trace": "x", SUBMITTED_AT: 5.0, CONTINUES: True, CAMPAIGN: "0123456789ab"}
    jobs.keep(job("a"), signature("a", link=[link], headers=headers, expires=6.0), WIDE)
    client.app.backend.store_result("a", ValueError("x"), states.FAILURE)
    assert client.retry("a").id == "a"
    sent = message(broker)
    assert (sent["headers"]["id"], sent["headers"]["task"]) == ("a", "idefics.caption")
    assert sent["headers"]["trace"] == "x"
    assert {CONTINUES, CAMPAIGN} & sent["headers"].keys() == set()
    assert sent["headers"]["expires"] is None
    assert abs(sent["headers"][SUBMITTED_AT] - time.time()) < 10
    assert URL not in sent["headers"]["kwargsrepr"]
    assert client.app.backend.get_task_meta("a", cache=False)["status"] == states.PENDING
    assert list(client.failed()) == []


def test_a_job_that_cannot_be_sent_stays(client: Client, jobs: FailedJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(jobs, job("a"))

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no broker")

    monkeypatch.setattr(client.app, "send_task", refuse)
    signature = jobs.signature("a")
    signature["options"]["chain"] = [{"task": "shop.next", "options": {"task_id": "b"}}]
    monkeypatch.setattr(jobs, "signature", {"a": signature}.__getitem__)
    for id in "ab":
        client.app.backend.store_result(id, ValueError("x"), states.FAILURE)
    with pytest.raises(ConnectionError):
        jobs.retry(jobs.get("a"))
    assert ids(jobs) == ["a"]
    for id in "ab":
        assert client.app.backend.get_task_meta(id, cache=False)["status"] == states.FAILURE


def test_a_job_that_fails_again_before_it_has_left_the_list_stays(
    client: Client, jobs: FailedJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = job("a", age_s=60), job("a")
    keep(jobs, first)
    monkeypatch.setattr(client.app, "send_task", lambda *_, **__: keep(jobs, again))
    jobs.retry(first)
    assert list(jobs) == [again]


def test_a_job_that_is_not_kept_cannot_be_sent_again(client: Client) -> None:
    with pytest.raises(LookupError, match="No failed job nobody"):
        client.retry("nobody")
