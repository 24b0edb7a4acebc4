"""What `idefics-jobs failed` shows and does."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from click.testing import CliRunner
from click.testing import Result as Outcome

from tasks import Client
from tasks.cli.failed import Selection, age
from tasks.cli.failed import failed as command
from tasks.cli.redaction import redacted
from tasks.failed import KEYS, FailedJob, FailedJobs
from tests.unit.failed.kept import WIDE, ids, job, keep, message, signature
from worker.demo.stack import Broker

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
def test_retry_and_drop_need_ids_or_a_selection(run: Any, jobs: FailedJobs, arguments: list[str]) -> None:
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
