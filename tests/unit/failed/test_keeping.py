"""The list of failed jobs: its bounds, and what a worker adds to it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from celery import Celery, states
from celery.app.task import Context
from celery.signals import task_failure

from tasks import ImageUnreachable, InvalidRequest, JobError
from tasks.failed import KEYS, FailedBounds, FailedJobs
from tasks.protocol import SUBMITTED_AT
from tests.unit.failed.kept import URL, WIDE, _run, ids, job, keep, signature
from worker.demo.stack import Broker
from worker.queue.dead_letters import unknown_task

# Keeping


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("idefics.captions", "did you mean idefics.caption?"),
        ("caption", "did you mean idefics.caption?"),
        ("shop.save", "use one of idefics.caption, "),
        ("shop.\x1b[2J" + "a" * 250, "use one of idefics.caption, "),
    ],
)
def test_the_error_for_an_unknown_task_is_one_short_line_with_the_cure(name: str, cure: str) -> None:
    told = unknown_task(name)
    assert cure in told
    assert "--queue" in told
    assert told.isprintable()
    assert len(told) < 400


def test_jobs_are_listed_the_oldest_first(jobs: FailedJobs) -> None:
    young, old = job("young"), job("old", age_s=60)
    keep(jobs, young, old)
    assert list(jobs) == [old, young]
    assert jobs.get("old") == old
    assert jobs.signature("old") == signature("old")


def test_a_job_that_fails_again_is_one_entry(jobs: FailedJobs) -> None:
    again = job("a", code="worker_lost")
    keep(jobs, job("a", age_s=60), again)
    assert list(jobs) == [again]


def test_the_oldest_go_when_there_are_too_many(jobs: FailedJobs) -> None:
    keep(jobs, *(job(str(n), age_s=10 - n) for n in range(5)), bounds=FailedBounds(3, 1_000_000, 3600))
    assert ids(jobs) == ["2", "3", "4"]


def test_the_oldest_go_when_all_are_too_large(jobs: FailedJobs) -> None:
    large = [job(str(n), age_s=10 - n, message="x" * 1000) for n in range(5)]
    keep(jobs, *large, bounds=FailedBounds(100, 3000, 3600))
    assert ids(jobs) == ["3", "4"]


def test_a_job_larger_than_the_whole_list_pushes_nothing_out(jobs: FailedJobs) -> None:
    keep(jobs, job("small"))
    with pytest.raises(ValueError, match="IDEFICS_FAILED_MAX_BYTES"):
        keep(jobs, job("large", message="x" * 2000), bounds=FailedBounds(100, 1000, 3600))
    assert ids(jobs) == ["small"]


def test_a_flood_of_invalid_requests_pushes_nothing_else_out(jobs: FailedJobs) -> None:
    few = FailedBounds(4, 1_000_000, 3600)
    keep(jobs, job("worthy", age_s=60), job("too", age_s=50), bounds=few)
    keep(jobs, *(job(str(n), code="invalid_request", age_s=40 - n) for n in range(20)), bounds=few)
    assert ids(jobs) == ["worthy", "too", "18", "19"]


def test_what_is_too_old_goes(jobs: FailedJobs) -> None:
    keep(jobs, job("old", age_s=86_401), job("young"))
    assert ids(jobs) == ["young"]


def test_every_key_ends_by_itself(jobs: FailedJobs, broker: Broker) -> None:
    keep(jobs, job("a"), job("b", code="invalid_request"))
    with broker.connect(1) as server:
        assert sorted(key.decode() for key in server.keys("*")) == sorted(KEYS)
        assert all(0 < server.ttl(key) <= 86_400 for key in KEYS)


def test_nothing_stays_of_what_was_dropped(jobs: FailedJobs, broker: Broker) -> None:
    kept = [job("a"), job("b", code="invalid_request"), job("c")]
    keep(jobs, *kept)
    assert all(map(jobs.drop, kept))
    with broker.connect(1) as server:
        assert {key: server.get(key) for key in server.keys("*")} == {KEYS[4].encode(): b"0"}


def test_a_job_that_failed_again_since_it_was_read_is_not_dropped(jobs: FailedJobs) -> None:
    read, again = job("a", age_s=60), job("a")
    keep(jobs, read, again)
    assert not jobs.drop(read)
    assert list(jobs) == [again]


def test_dropping_makes_room_on_a_full_server(jobs: FailedJobs, broker: Broker) -> None:
    kept = job("a", message="x" * 100_000)
    keep(jobs, kept)
    with broker.connect(1) as server:
        server.config_set("maxmemory", 1)
        try:
            assert jobs.drop(kept)
        finally:
            server.config_set("maxmemory", 0)


def test_a_backend_other_than_redis_is_refused() -> None:
    with pytest.raises(ValueError, match="results' Redis"):
        FailedJobs(Celery("no-results", set_as_current=False))


# What the worker keeps


def fail(app: Celery, error: BaseException, **request: Any) -> None:
    task = app.tasks["idefics.caption"]
    context = Context(id="a", hostname="celery@here", args=[], kwargs={"image": URL}, **request)
    task.request_stack.push(context)
    try:
        task_failure.send(sender=task, task_id="a", exception=error, args=[], kwargs={"image": URL})
    finally:
        task.request_stack.pop()


def test_a_failure_is_kept_whole(app: Celery) -> None:
    link = signature("link")
    delivery = {"exchange": "", "routing_key": "idefics", "priority": 7}
    fail(
        app, ImageUnreachable("It is away."), retries=3, callbacks=[link], errbacks=[link], chain=[link],
        delivery_info=delivery, headers={SUBMITTED_AT: 5.0, "trace": "x"}, timelimit=[9, 8],
        **{SUBMITTED_AT: 5.0},
    )  # fmt: skip
    (kept,) = FailedJobs(app)
    assert (kept.id, kept.code, kept.message, kept.host) == ("a", "image_unreachable", "It is away.", "celery@here")
    assert (kept.task, kept.attempts, kept.submitted_at) == ("idefics.caption", 4, 5.0)
    assert abs(kept.failed_at - time.time()) < 10
    whole = FailedJobs(app).signature("a")
    assert whole["kwargs"] == {"image": URL}
    expected = {
        "task_id": "a", "retries": 0, "link": [link], "link_error": [link], "chain": [link], "queue": "idefics",
        "priority": 7, "headers": {SUBMITTED_AT: 5.0, "trace": "x"}, "time_limit": 9, "soft_time_limit": 8,
    }  # fmt: skip
    assert {name: whole["options"][name] for name in expected} == expected


def test_a_failure_without_its_request_keeps_the_payload(app: Celery) -> None:
    task = app.tasks["idefics.caption"]
    task_failure.send(sender=task, task_id="b", exception=InvalidRequest("No."), args=[], kwargs={"image": URL})
    assert FailedJobs(app).signature("b")["kwargs"] == {"image": URL}
    assert ids(FailedJobs(app)) == ["b"]


@pytest.mark.parametrize(
    ("error", "kwargs", "is_whole"),
    [
        (InvalidRequest("No."), {"prompt": ["x" * 200_001]}, False),
        (InvalidRequest("No."), {"prompt": ["x"] * 200_001}, False),
        (InvalidRequest("No."), {"metadata": {"x" * 100_000: "y" * 100_001}}, False),
        (InvalidRequest("No."), {"prompt": ["x" * 199_000]}, True),
        (ImageUnreachable("Away."), {"image": "x" * 200_001}, True),
    ],
)
def test_only_a_large_invalid_request_is_kept_without_its_payload(
    app: Celery, error: JobError, kwargs: dict[str, Any], is_whole: bool
) -> None:
    task_failure.send(sender=app.tasks["idefics.caption"], task_id="b", exception=error, args=[], kwargs=kwargs)
    (kept,) = jobs = FailedJobs(app)
    assert kept.is_whole is is_whole
    if is_whole:
        assert jobs.signature("b")["kwargs"] == kwargs
    else:
        with pytest.raises(LookupError, match="its producer has it"):
            jobs.retry(kept)


@pytest.mark.parametrize(("state", "kept"), [(states.SUCCESS, []), (states.REVOKED, []), (states.FAILURE, ["a"])])
def test_a_job_that_another_run_ended_is_not_kept(app: Celery, state: str, kept: list[str]) -> None:
    app.backend.store_result("a", None if state == states.SUCCESS else ValueError("x"), state)
    fail(app, ImageUnreachable("It is away."))
    assert ids(FailedJobs(app)) == kept


def test_another_apps_failure_is_not_ours(app: Celery) -> None:
    other = Celery("other", set_as_current=False)
    other.task(name="idefics.caption")(_run)
    fail(other, ImageUnreachable("It is away."))
    assert ids(FailedJobs(app)) == []


def test_a_job_that_cannot_be_kept_is_logged(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    fail(app, ImageUnreachable("It is away."), callbacks=[{"task": "x", "args": ["y" * 1_000_000]}])
    assert "Job a failed and cannot be kept" in caplog.text
    assert "IDEFICS_FAILED_MAX_BYTES" in caplog.text


def test_a_list_of_which_a_key_was_deleted_takes_new_jobs(app: Celery, broker: Broker) -> None:
    fail(app, InvalidRequest("No."))
    broker.connect().delete("idefics:failed")
    jobs = FailedJobs(app)
    keep(jobs, *[job(id) for id in "bcd"], bounds=replace(WIDE, jobs=2))
    assert len(ids(jobs)) == 2
