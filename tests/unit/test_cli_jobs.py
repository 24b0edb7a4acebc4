"""`idefics-jobs status`, `cancel` and `queue`, on a real Redis without a worker."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from celery import states
from click.testing import CliRunner
from click.testing import Result as Outcome

from tasks import Caption, Client, ImageUnreachable, JobTimeout, WorkerLost
from tasks.cli import connection, jobs, main
from tasks.cli.queue import queue_state
from tasks.errors import NotPermitted
from tasks.redis_keys import CANCELLATION, DUE, SEPARATOR, UNACKED
from tasks.testing import FakeClient, canned
from tasks.worker_registry import no_worker, register
from worker.demo.stack import Broker

CAPTION = Caption(image="https://example.com/a.jpg")
URL = "https://user:pw@example.com/a.jpg?signature=s"


@pytest.fixture
def client(broker: Broker) -> Iterator[Client]:
    yield Client(broker.url)
    broker.connect(0).flushdb()
    broker.connect(1).flushdb()


@pytest.fixture
def run(broker: Broker) -> Callable[..., Outcome]:
    return lambda *arguments: CliRunner().invoke(main, ["--broker", broker.url, *arguments])


def json_lines(outcome: Outcome) -> list[dict[str, Any]]:
    assert outcome.exit_code == 0, outcome.output
    return [json.loads(line) for line in outcome.stdout.splitlines()]


@pytest.fixture
def stored(client: Client) -> Client:
    """Jobs in every state, each with its state as its id."""
    answer = canned("a cat", CAPTION).model_dump(mode="json")
    store = client.app.backend.store_result
    store("started", {}, states.STARTED)
    store("retry", ImageUnreachable(f"{URL} is away.", detail="http_503"), states.RETRY)
    store("success", answer, states.SUCCESS)
    store("failure", WorkerLost("It was lost."), states.FAILURE)
    store("revoked", ValueError("revoked"), states.REVOKED)
    return client


IDS = ("unknown", "started", "retry", "success", "failure", "revoked")


# status


def test_status_names_each_state_with_its_code(stored: Client, run: Callable[..., Outcome]) -> None:
    found = json_lines(run("status", *IDS, "--json"))
    assert [(one["id"], one["status"], one["code"], one["detail"]) for one in found] == [
        ("unknown", "queued", None, None),
        ("started", "running", None, None),
        ("retry", "retrying", "image_unreachable", "http_503"),
        ("success", "succeeded", None, None),
        ("failure", "failed", "worker_lost", None),
        ("revoked", "canceled", None, None),
    ]


def test_status_is_plain_lines_without_secrets(stored: Client, run: Callable[..., Outcome]) -> None:
    assert run("status", "retry", "success", "failure").stdout.splitlines() == [
        "retry\tretrying\timage_unreachable/http_503\thttps://****@example.com/a.jpg?**** is away.",
        "success\tsucceeded\t-\t-",
        "failure\tfailed\tworker_lost\tIt was lost.",
    ]


def test_status_of_a_queued_job_says_that_no_worker_takes_it(client: Client, run: Callable[..., Outcome]) -> None:
    job = client.submit(CAPTION)
    assert run("status", job.id).stdout == f"{job.id}\tqueued\t-\t{no_worker('idefics')}\n"
    assert json_lines(run("status", job.id, "--json"))[0]["message"] == no_worker("idefics")
    assert json_lines(run("--queue", "other", "status", job.id, "--json"))[0]["message"] == no_worker("other")


def test_status_of_a_queued_job_is_plain_while_a_worker_takes_jobs(
    client: Client, run: Callable[..., Outcome], broker: Broker
) -> None:
    client.app.amqp.queues.add("idefics")
    client.app.amqp.queues.select("idefics")
    register(client.app, "gpu0@here", "demo", broker.connect(0))
    assert run("status", client.submit(CAPTION).id).stdout.endswith("\tqueued\t-\t-\n")


def test_status_is_told_to_a_user_who_may_not_ask_for_workers(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> list[str]:
        raise NotPermitted("no")

    monkeypatch.setattr(client, "workers", refuse)
    assert jobs.statuses(client, ["unknown"]) == [jobs.JobStatus("unknown", "queued")]


def test_a_wait_without_a_worker_says_so_when_its_time_is_over(client: Client) -> None:
    with pytest.raises(JobTimeout, match=re.escape(no_worker("idefics"))):
        client.submit(CAPTION).result(timeout=0.2)


def test_a_repeated_id_is_shown_once(stored: Client, run: Callable[..., Outcome]) -> None:
    assert len(run("status", "success", "success").stdout.splitlines()) == 1


def test_a_job_that_ends_between_two_reads_is_shown_as_ended(stored: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_of_job", lambda job: jobs.JobStatus(job.id, "running"))
    assert [one.status for one in jobs.statuses(stored, ["failure"])] == ["failed"]


def test_status_with_the_fake_client(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeClient()
    monkeypatch.setattr(connection, "Client", lambda *args, **options: fake)
    job = fake.submit(CAPTION)
    assert CliRunner().invoke(main, ["status", job.id]).stdout == f"{job.id}\tsucceeded\t-\t-\n"


@pytest.mark.parametrize("command", ["status", "cancel"])
def test_no_id_is_a_usage_error(run: Callable[..., Outcome], command: str) -> None:
    assert run(command).exit_code == 2


# cancel


def test_cancel_leaves_a_note_for_workers_and_ended_jobs_alone(
    stored: Client, run: Callable[..., Outcome], broker: Broker
) -> None:
    assert run("cancel", "started", "success", "revoked").stdout.splitlines() == [
        "started will be canceled",
        "success has already succeeded",
        "revoked has already been canceled",
    ]
    assert broker.connect(1).keys(f"{CANCELLATION.prefix}*") == [CANCELLATION.named("started").encode()]


def test_cancel_says_in_json_what_was_requested(stored: Client, run: Callable[..., Outcome]) -> None:
    assert json_lines(run("cancel", "unknown", "failure", "--json")) == [
        {"id": "unknown", "requested": True, "status": "queued"},
        {"id": "failure", "requested": False, "status": "failed"},
    ]


# queue


def test_queue_counts_what_waits_by_priority_what_is_held_and_who_works(
    client: Client, run: Callable[..., Outcome], broker: Broker
) -> None:
    for priority in (5, 5, 9):
        client.submit(CAPTION, priority=priority)
    redis = broker.connect(0)
    redis.zadd(DUE.named("idefics"), {"a": 1})
    redis.zadd(f"{DUE.prefix}idefics{SEPARATOR}5", {"b": 1, "c": 2})
    redis.zadd(DUE.named("another"), {"d": 1})
    redis.hset(UNACKED.named(), "tag", "message")
    client.app.amqp.queues.add("idefics")
    client.app.amqp.queues.select("idefics")
    register(client.app, "gpu0@here", "demo", redis)
    rows = run("queue").stdout.splitlines()
    assert re.fullmatch(r"oldest waiting\t\d+\.\d s", rows.pop(3))
    assert rows == [
        "waiting\t3",
        "waiting, priority 5\t2",
        "waiting, priority 9\t1",
        "due later\t3",
        "in flight (all queues)\t1",
        "workers\t1",
        "worker\tgpu0@here",
        "model\tdemo",
    ]
    (state,) = json_lines(run("queue", "--json"))
    assert 0 <= state.pop("oldest_age_s") < 60
    assert state == {
        "queue": "idefics",
        "waiting": 3,
        "by_priority": {str(priority): {5: 2, 9: 1}.get(priority, 0) for priority in range(10)},
        "due_later": 3,
        "in_flight": 1,
        "workers": ["gpu0@here"],
        "models": ["demo"],
    }


def test_queue_reads_the_queue_that_is_named(client: Client, run: Callable[..., Outcome]) -> None:
    client.submit(CAPTION)
    assert json_lines(run("--queue", "idefics.large", "queue", "--json"))[0]["waiting"] == 0


def test_what_this_user_may_not_know_is_unknown(broker: Broker, client: Client) -> None:
    client.submit(CAPTION)
    admin = broker.connect()
    admin.acl_setuser("counter", enabled=True, nopass=True, keys=["idefics*"], commands=["+llen", "+select", "+ping"])
    try:
        state = queue_state(Client(replace(broker, credentials="counter:x@").url))
    finally:
        admin.acl_deluser("counter")
    assert (state.waiting, state.oldest_age_s, state.due_later, state.in_flight) == (1, None, None, None)
    assert (state.workers, state.models) == (None, None)


def test_a_queue_that_this_user_may_not_count_is_told(broker: Broker, run: Callable[..., Outcome]) -> None:
    admin = broker.connect()
    admin.acl_setuser("blind", enabled=True, nopass=True, commands=["+select", "+ping"])
    try:
        outcome = run("--broker", replace(broker, credentials="blind:x@").url, "queue")
    finally:
        admin.acl_deluser("blind")
    assert outcome.exit_code == 1
    assert "may not count the jobs in idefics" in outcome.stderr


@pytest.mark.parametrize("words", [("status", "a"), ("cancel", "a"), ("queue",)])
def test_a_redis_that_is_away_is_told(words: tuple[str, ...]) -> None:
    outcome = CliRunner().invoke(main, ["--broker", "redis://localhost:1/0", *words])
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert outcome.stderr.startswith("Error: Redis does not answer")


# watch


def _command(client: FakeClient, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Outcome:
    monkeypatch.setattr(connection, "Client", lambda *_, **__: client)
    return CliRunner().invoke(main, arguments)


def test_watch_prints_the_text_and_its_stages_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient(lambda job: "a\n\x1b[2Jcat")
    job = client.submit(CAPTION.model_copy(update={"stream": True}))
    for id in (job.id, client.submit(CAPTION).id):
        told = _command(client, monkeypatch, "watch", id)
        assert (told.exit_code, told.stdout) == (0, "a\n\\x1b[2Jcat\n")
        assert told.stderr == "[running]\n"
    updates = json_lines(_command(client, monkeypatch, "watch", job.id, "--json"))
    assert [update["kind"] for update in updates] == ["stage", "text", "end"]
    assert updates[-1]["result"]["text"] == "a\n\x1b[2Jcat"


def test_a_job_is_submitted_and_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient(lambda job: "a cat")
    told = _command(client, monkeypatch, "submit", "caption", f"image={CAPTION.arguments()['image']}", "--stream")
    assert (told.exit_code, told.stdout) == (0, "a cat\n")
    assert client.submitted[0].stream


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_watching_a_job_that_fails_exits_with_its_code(more: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(job: Any) -> str:
        raise WorkerLost("It was lost.")

    client = FakeClient(fail)
    told = _command(client, monkeypatch, "watch", client.submit(CAPTION).id, *more)
    assert told.exit_code == 1
    assert told.stderr.splitlines()[-1] == "worker_lost: It was lost."
