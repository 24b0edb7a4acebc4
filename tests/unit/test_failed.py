"""The list of failed jobs, in a real Redis without a worker: what is kept, for how long, and what is shown of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, states
from celery.app.task import Context
from celery.signals import task_failure
from click.testing import CliRunner
from click.testing import Result as Outcome

from tasks import Client, ImageUnreachable, InvalidRequest, JobError
from tasks.cli.failed import Selection, age
from tasks.cli.failed import failed as command
from tasks.cli.redaction import redacted
from tasks.failed import KEYS, FailedBounds, FailedJob, FailedJobs
from tasks.protocol import CONTINUES, SUBMITTED_AT
from worker.demo.stack import Broker
from worker.queue.dead_letters import keep_failures, unknown_task

WIDE = FailedBounds(jobs=100, bytes=1_000_000, ttl_s=86_400)
URL = "https://example.com/a.jpg"


@pytest.fixture
def client(broker: Broker) -> Iterator[Client]:
    client = Client(broker.url)
    yield client
    broker.connect(0).flushdb()
    broker.connect(1).flushdb()


@pytest.fixture
def jobs(client: Client) -> FailedJobs:
    return FailedJobs(client.app)


def job(id: str, code: str = "image_unreachable", age_s: float = 0.0, **fields: Any) -> FailedJob:
    known: dict[str, Any] = {
        "task": "idefics.caption", "message": "No.", "host": "a@b", "attempts": 4, "submitted_at": None,
    }  # fmt: skip
    return FailedJob(**{"id": id, "code": code, "failed_at": time.time() - age_s, **known, **fields})


def signature(id: str, **options: Any) -> dict[str, Any]:
    return {
        "task": "idefics.caption",
        "args": [],
        "kwargs": {"image": URL},
        "options": {"task_id": id, "queue": "idefics", "priority": 7, **options},
        "subtask_type": None,
        "immutable": False,
    }


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


def keep(jobs: FailedJobs, *kept: FailedJob, bounds: FailedBounds = WIDE) -> None:
    for one in kept:
        jobs.keep(one, signature(one.id), bounds)


def ids(jobs: FailedJobs) -> list[str]:
    return [job.id for job in jobs]


def message(broker: Broker, priority: int = 7) -> dict[str, Any]:
    """The queue's one message."""
    (raw,) = broker.connect().lrange(f"idefics\x06\x16{priority}", 0, -1)
    return dict(json.loads(raw))


# Keeping


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


def _run(**_: Any) -> None:
    """A task's body."""


@pytest.fixture
def app(client: Client) -> Celery:
    """An app with a task, whose failures are kept."""
    app = client.app
    app.task(name="idefics.caption", shared=False)(_run)
    keep_failures(app, WIDE)
    return app


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


# Sending again


def test_a_job_is_sent_again_as_it_was(client: Client, jobs: FailedJobs, broker: Broker) -> None:
    link = signature("link")
    jobs.keep(
        job("a"),
        signature("a", link=[link], headers={"trace": "x", SUBMITTED_AT: 5.0, CONTINUES: True}, expires=6.0),
        WIDE,
    )
    client.app.backend.store_result("a", ValueError("x"), states.FAILURE)
    assert client.retry("a").id == "a"
    sent = message(broker)
    assert (sent["headers"]["id"], sent["headers"]["task"]) == ("a", "idefics.caption")
    assert sent["headers"]["trace"] == "x"
    assert CONTINUES not in sent["headers"]
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


# What is shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("https://u:p@example.com/a.jpg?X-Signature=s#f", "https://****@example.com/a.jpg?****"),
        ("See http://example.com/a?b=c now", "See http://example.com/a?**** now"),
        ("redis://:pw@host:6379/0", "redis://****@host:6379/0"),
        ("data:image/png;base64,iVBORw0KGgo=", "data:image/png;base64,****"),
        ("A cat.", "A cat."),
        ("x" * 300, "x" * 200 + "... (300 characters)"),
        ({"api_key": "k", "max_new_tokens": 5, "image": {"path": "a.png"}},
         {"api_key": "****", "max_new_tokens": 5, "image": {"path": "a.png"}}),
        ([{"image_url": {"url": "https://example.com/a?b"}}], [{"image_url": {"url": "https://example.com/a?****"}}]),
        (None, None),
    ],
)  # fmt: skip
def test_secrets_are_not_shown(value: Any, shown: Any) -> None:
    assert redacted(value) == shown


@pytest.mark.parametrize(("written", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("7d", 604_800)])
def test_an_age_has_a_unit(written: str, seconds: float) -> None:
    assert age(written) == seconds


def test_a_selection_is_what_passes_all_filters() -> None:
    one = job("a", code="worker_lost", failed_at=100.0)
    assert Selection().holds(one, 160)
    assert Selection(("a",), ("worker_lost",), ("idefics.caption",), 59, 61).holds(one, 160)
    for other in (
        Selection(ids=("b",)),
        Selection(codes=("internal",)),
        Selection(tasks=("idefics.chat",)),
        Selection(older_than=60),
        Selection(newer_than=60),
    ):
        assert not other.holds(one, 160), other


# The command


@pytest.fixture
def run(client: Client, jobs: FailedJobs) -> Any:
    secret = "https://example.com/a.jpg?X-Signature=s"
    kept = [
        job("a", age_s=7200, message=f"{secret} is away."),
        job("b", code="worker_lost", age_s=60),
        job("c", code="worker_lost", task="idefics.chat"),
    ]
    for one in kept:
        jobs.keep(one, {**signature(one.id), "kwargs": {"image": secret, "prompt": "p" * 300}}, WIDE)

    def run(*arguments: str) -> Outcome:
        return CliRunner().invoke(command, arguments, obj=lambda: client)

    return run


def test_ls_lists_and_counts(run: Any) -> None:
    lines = run("ls").output.splitlines()
    assert [line.split()[1:5] for line in lines[:-1]] == [
        ["a", "idefics.caption", "image_unreachable", "4x"],
        ["b", "idefics.caption", "worker_lost", "4x"],
        ["c", "idefics.chat", "worker_lost", "4x"],
    ]
    assert lines[0].endswith("a@b: https://example.com/a.jpg?**** is away.")
    assert lines[-1] == "3 failed jobs: 2 worker_lost, 1 image_unreachable"


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        (("--code", "worker_lost"), ["b", "c"]),
        (("--code", "worker_lost", "--code", "image_unreachable"), ["a", "b", "c"]),
        (("--task", "idefics.chat"), ["c"]),
        (("--older-than", "1h"), ["a"]),
        (("--newer-than", "1h", "--older-than", "30s"), ["b"]),
    ],
)
def test_ls_filters(run: Any, filters: tuple[str, ...], found: list[str]) -> None:
    lines = run("ls", "--json", *filters).output.splitlines()
    assert [json.loads(line)["id"] for line in lines] == found


def test_a_detail_sorts_failures_of_one_code(run: Any, jobs: FailedJobs) -> None:
    for id, detail in (("d", "http_404"), ("e", "not_a_picture"), ("f", "http_404")):
        jobs.keep(job(id, code="image_invalid", detail=detail), signature(id), WIDE)
    found = [json.loads(line) for line in run("ls", "--json", "--detail", "http_404").output.splitlines()]
    assert [(one["id"], one["code"], one["detail"]) for one in found] == [
        ("d", "image_invalid", "http_404"),
        ("f", "image_invalid", "http_404"),
    ]
    counts = run("ls", "--code", "image_invalid").output.splitlines()[-1]
    assert counts == "3 failed jobs: 2 image_invalid/http_404, 1 image_invalid/not_a_picture"


def test_a_record_of_a_newer_worker_is_read(jobs: FailedJobs, client: Client) -> None:
    jobs.keep(job("n"), signature("n"), WIDE)
    redis = client.app.backend.client
    about = json.loads(redis.hget(KEYS[2], "n"))
    redis.hset(KEYS[2], "n", json.dumps({**about, "added_later": 1}))
    assert jobs.get("n").id == "n"
    assert [one.id for one in jobs] == ["n"]


def test_show_leaves_secrets_out_unless_told(run: Any) -> None:
    shown = json.loads(run("show", "a").output)
    assert shown["signature"]["kwargs"] == {
        "image": "https://example.com/a.jpg?****",
        "prompt": "p" * 200 + "... (300 characters)",
    }
    assert shown["code"] == "image_unreachable"
    assert "X-Signature" not in json.dumps(shown)
    revealed = json.loads(run("show", "a", "--reveal").output)
    assert revealed["signature"]["kwargs"] == {"image": "https://example.com/a.jpg?X-Signature=s", "prompt": "p" * 300}


def test_retry_sends_those_that_pass_the_filters(run: Any, jobs: FailedJobs, broker: Broker) -> None:
    assert run("retry", "--code", "worker_lost", "--older-than", "30s").output == "1 jobs sent again\n"
    assert ids(jobs) == ["a", "c"]
    assert message(broker)["headers"]["id"] == "b"


def test_retry_by_id_and_of_all(run: Any, jobs: FailedJobs) -> None:
    assert run("retry", "a", "c").output == "2 jobs sent again\n"
    assert ids(jobs) == ["b"]
    assert run("retry", "--all").output == "1 jobs sent again\n"
    assert ids(jobs) == []


def test_each_command_prints_json_on_one_line(run: Any) -> None:
    shown = run("show", "a", "--json").output
    assert (shown.count("\n"), json.loads(shown)["id"]) == (1, "a")
    assert run("retry", "a", "--json").output == '{"sent": 1, "left": 0}\n'
    assert run("drop", "--all", "--json").output == '{"dropped": 2}\n'


def test_retry_goes_on_where_a_job_has_left_the_list_meanwhile(
    run: Any, jobs: FailedJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = FailedJobs.retry

    def retry(self: FailedJobs, job: FailedJob, queue: str | None) -> None:
        if job.id == "a":
            self.drop(job)
        stock(self, job, queue)

    monkeypatch.setattr(FailedJobs, "retry", retry)
    assert run("retry", "--all").output == "2 jobs sent again\n"


@pytest.mark.parametrize(
    ("task", "priority", "words", "list_"),
    [
        ("idefics.caption", 5, [], "idefics\x06\x165"),
        ("idefics.caption", 5, ["--queue", "big"], "big\x06\x165"),
        ("site.save", 5, [], "celery\x06\x163"),
        ("site.save", None, ["--queue", "site"], "site"),
        ("site.save", 8, ["--queue", "site"], "site\x06\x166"),
    ],
)
def test_retry_sends_a_job_where_its_worker_reads(
    run: Any, client: Client, broker: Broker, task: str, priority: int | None, words: list[str], list_: str
) -> None:
    kept = {**signature("x", priority=priority), "task": task}
    if not task.startswith("idefics."):
        del kept["options"]["queue"]
    FailedJobs(client.app).keep(job("x", task=task), kept, WIDE)
    outcome = run("retry", "x", *words)
    assert (outcome.exception, outcome.output) == (None, "1 jobs sent again\n")
    assert broker.connect(0).llen(list_) == 1


def test_retry_leaves_what_was_kept_without_its_payload(run: Any, jobs: FailedJobs) -> None:
    keep(jobs, job("d", "invalid_request", is_whole=False))
    assert run("retry", "--all").output == "3 jobs sent again, 1 left whose payloads were not kept\n"
    assert ids(jobs) == ["d"]
    assert json.loads(run("show", "d").output)["signature"] == {}


def test_drop_takes_off_the_list_and_sends_nothing(run: Any, jobs: FailedJobs, broker: Broker) -> None:
    assert run("drop", "--newer-than", "1h").output == "2 jobs dropped\n"
    assert ids(jobs) == ["a"]
    assert not broker.connect().keys("idefics*")


@pytest.mark.parametrize(
    "arguments", [("retry",), ("drop",), ("retry", "a", "--all"), ("drop", "--all", "--code", "x")]
)
def test_what_is_meant_must_be_said(run: Any, jobs: FailedJobs, arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert outcome.exit_code == 2
    assert "Say which jobs" in outcome.output
    assert len(ids(jobs)) == 3


def test_an_unknown_id_stops_a_retry_before_it_sends_any(run: Any, jobs: FailedJobs) -> None:
    outcome = run("retry", "a", "nobody")
    assert outcome.exit_code == 1
    assert "No failed job nobody" in outcome.output
    assert len(ids(jobs)) == 3


def test_celerys_context_has_the_app(run: Any, client: Client) -> None:
    context = SimpleNamespace(app=client.app)
    assert "3 failed jobs" in CliRunner().invoke(command, ["ls"], obj=context).output


def test_an_app_without_redis_is_told(run: Any) -> None:
    context = SimpleNamespace(app=Celery("no-results", set_as_current=False))
    outcome = CliRunner().invoke(command, ["ls"], obj=context)
    assert outcome.exit_code == 2
    assert "celery -A worker.app failed" in outcome.output


def test_a_redis_that_is_away_is_told() -> None:
    app = Celery("away", backend="redis://localhost:1/0", set_as_current=False)
    outcome = CliRunner().invoke(command, ["ls"], obj=SimpleNamespace(app=app))
    assert outcome.exit_code == 1
    assert "Redis does not answer" in outcome.output
