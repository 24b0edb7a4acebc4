"""Links into the producer's own app, whose worker is a stock one, reach it; what comes to us by mistake is kept."""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.canvas import Signature

from tasks import Client

# Not the site itself: its shared tasks would be those of every app of this process.
from tests.flow.site_settings import NOTES, RoutedSettings, Settings
from tests.support.gallery import Gallery
from tests.support.stand import command, stand
from tests.support.waiting import PATIENCE_S
from worker.demo import stack


class Site:
    """The site's code: what it sends."""

    def __init__(self, server: stack.Broker, is_routed: bool) -> None:
        self.server = server
        self.app = Celery("site", set_as_current=False)
        self.app.config_from_object(RoutedSettings if is_routed else Settings, namespace="CELERY")
        self.app.conf.update(broker_url=server.url, result_backend=server.results)
        self._queue = {} if is_routed else {"queue": "idefics"}

    def ours(self, text: str = "Hello", tokens: int = 3, **options: Any) -> Signature:
        arguments = {"prompt": [text], "max_new_tokens": tokens}
        return self.app.signature("idefics.complete", kwargs=arguments, **self._queue, **options)

    def theirs(self, task: str, *arguments: Any, **options: Any) -> Signature:
        return self.app.signature(f"site.{task}", args=arguments, **options)

    def noted(self, under: str) -> Any:
        with self.server.connect(NOTES) as notes:
            noted = notes.blpop([under], timeout=int(PATIENCE_S))
        assert noted, f"nothing was noted under {under}"
        return json.loads(noted[1])

    def close(self) -> None:
        """Have Celery's handles, which the tests' frames keep, tell nobody that they are gone: the server is, too."""
        self.app.backend.result_consumer.cancel_for = lambda job: None

    def bindings(self) -> dict[str, set[str]]:
        redis = self.server.connect()
        return {key.decode(): redis.smembers(key) for key in redis.keys("_kombu.binding.*")}


@pytest.fixture(scope="module", params=[False, True], ids=["without-routes", "with-routes"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """With a broker, one worker of ours and two stock ones of the site's: one started without a flag."""
    logs = tmp_path_factory.mktemp("links")
    with ExitStack() as opened:
        gallery = opened.enter_context(Gallery().open())
        server = opened.enter_context(stack.broker())
        for name, arguments in (("site", []), ("reports", ["--queues", "reports"])):
            log = logs / name
            program = [sys.executable, "-m", "celery", "-A", "tests.flow.site", "worker", "--pool", "solo"]
            program += ["--hostname", f"{name}@%h", "--without-mingle", "--without-gossip", "--loglevel", "INFO"]
            environment = {**os.environ, "SITE_BROKER": server.url, "SITE_RESULTS": server.results}
            environment["SITE_ROUTES"] = "1" if request.param else ""
            process = opened.enter_context(stack.started(program + arguments, log=log, environment=environment))
            stack.await_line(process, log, " ready.", PATIENCE_S)
        opened.enter_context(stand(server, gallery, logs / "log", MAX_RETRIES="1"))
        site = Site(server, request.param)
        yield site
        site.close()


@pytest.fixture
def under() -> str:
    return uuid.uuid4().hex


def texts(answers: list[Any]) -> list[Any]:
    return [answer["text"] if isinstance(answer, dict) else answer for answer in answers]


# --- Links reach the producer's own worker --------------------------------------------------------


def test_a_chain_goes_on_in_the_sites_worker_and_comes_back(site: Site, under: str) -> None:
    job = (site.ours() | site.theirs("save", under) | site.theirs("save", under)).apply_async()
    assert job.get(timeout=PATIENCE_S)["text"] == "llo"
    again = chain(site.theirs("number", 1), site.ours(immutable=True), site.theirs("save", under)).apply_async()
    assert again.get(timeout=PATIENCE_S)["text"] == "llo"


def test_links_and_groups_of_links_arrive(site: Site, under: str) -> None:
    links = [site.theirs("save", under), group([site.theirs("save", under)] * 2, app=site.app)]
    site.ours(link=links).apply_async()
    assert texts([site.noted(under) for _ in range(3)]) == ["llo"] * 3


def test_an_errback_of_a_failed_job_arrives(site: Site, under: str) -> None:
    job = site.ours(tokens=-1, link_error=[site.theirs("mourn", under)] * 2).apply_async()
    assert [site.noted(under), site.noted(under)] == [job.id] * 2


def test_an_errback_of_ours_runs_in_our_queue(site: Site) -> None:
    cure = site.ours("cured", immutable=True, task_id=str(uuid.uuid4()))
    site.ours(tokens=-1, link_error=cure).apply_async()
    assert site.app.AsyncResult(cure.id).get(timeout=PATIENCE_S)["text"] == "red"


def test_a_chord_of_mixed_jobs_has_its_body_in_the_sites_worker(site: Site, under: str) -> None:
    parts = [site.ours("one"), site.theirs("number", 2), site.ours("three")]
    joined = chord(parts, app=site.app)(site.theirs("join", under))
    assert joined.get(timeout=PATIENCE_S) == "one+2+ree"


def test_a_chord_whose_body_is_ours_runs_it(site: Site) -> None:
    joined = chord([site.ours("one"), site.theirs("number", 2)], app=site.app)(site.ours("body", immutable=True))
    assert joined.get(timeout=PATIENCE_S)["text"] == "ody"


def test_a_chord_within_a_chain_is_sent_by_our_worker(site: Site, under: str) -> None:
    parts = group([site.theirs("save", under), site.theirs("save", under)], app=site.app)
    joined = (site.ours() | parts | site.theirs("join", under)).apply_async()
    assert joined.get(timeout=PATIENCE_S) == "llo+llo"


def test_a_group_of_jobs_within_a_chain(site: Site, under: str) -> None:
    parts = group([site.ours("one", immutable=True), site.ours("two", immutable=True)], app=site.app)
    joined = (site.theirs("number", 1) | parts | site.theirs("join", under)).apply_async()
    assert joined.get(timeout=PATIENCE_S) == "one+two"


def test_a_link_that_names_a_queue_goes_there(site: Site, under: str) -> None:
    site.ours(link=site.theirs("report", under, queue="reports")).apply_async()
    assert site.noted(under)["text"] == "llo"


@pytest.mark.parametrize("priority", [None, 0, 1, 3, 5, 9])
@pytest.mark.parametrize("queue", [None, "reports"])
def test_a_links_priority_is_one_that_a_stock_worker_reads(
    site: Site, under: str, queue: str | None, priority: int | None
) -> None:
    options = {name: value for name, value in (("queue", queue), ("priority", priority)) if value is not None}
    link = site.theirs("report", under, **options)
    # Celery drops the priority of links and of what follows in a chain; errbacks and chords' bodies keep theirs.
    site.ours(link=link).apply_async(priority=5)
    assert site.noted(under)["text"] == "llo"
    job = site.ours(tokens=-1, link_error=link).apply_async(priority=5)
    assert site.noted(under) == job.id
    chord([site.ours("one"), site.ours("two")], app=site.app)(link)
    assert texts(site.noted(under)) == ["one", "two"]


def test_no_queue_is_bound_but_as_the_site_itself_binds_it(site: Site, under: str) -> None:
    site.theirs("report", under).apply_async(args=("x",), queue="reports")
    site.theirs("save", under).apply_async(args=("x",), queue="celery")
    before = site.bindings()
    site.ours(link=[site.theirs("save", under), site.theirs("report", under, queue="reports")]).apply_async()
    assert texts([site.noted(under) for _ in range(4)]).count("llo") == 2
    assert site.bindings() == before
    assert before.keys() >= {"_kombu.binding.celery", "_kombu.binding.idefics", "_kombu.binding.reports"}


def test_retries_stay_in_our_queue(site: Site, under: str) -> None:
    job = site.app.signature(
        "idefics.complete", kwargs={"prompt": [{"image": "http://127.0.0.1:9/x"}, "Hello"]}, queue="idefics"
    )
    ended = job.apply_async(link_error=site.theirs("mourn", under))
    assert site.noted(under) == ended.id
    assert site.server.connect().llen("celery") == 0


# --- What comes to us by mistake ------------------------------------------------------------------


def test_a_message_for_no_task_of_ours_is_kept_named_and_can_be_sent_on(site: Site, under: str) -> None:
    linked = uuid.uuid4().hex
    lost = site.theirs("save", {"text": "x"}, under).apply_async(
        queue="idefics", priority=5, link=site.theirs("save", linked)
    )
    error = lost.get(timeout=PATIENCE_S, propagate=False)
    assert error.args[0] == "invalid_request"
    assert "site.save" in error.args[1]
    assert "idefics.caption" in error.args[1]
    assert "--queue" in error.args[1]
    client = Client(site.server.url)
    (kept,) = [job for job in client.failed() if job.id == lost.id]
    assert (kept.task, kept.code, kept.is_whole) == ("site.save", "invalid_request", True)
    listed = command(site.server, "tasks", "failed", "ls", "--task", "site.save")
    assert lost.id in listed
    assert "invalid_request" in listed
    said = command(site.server, "tasks", "failed", "retry", lost.id, "--queue", "celery")
    assert said == "1 jobs sent again\n"
    assert site.noted(under) == {"text": "x"}
    assert site.noted(linked) == {"text": "x"}
    assert site.app.AsyncResult(lost.id).get(timeout=PATIENCE_S) == {"text": "x"}
    assert lost.id not in [job.id for job in client.failed()]


def test_what_waits_for_a_misrouted_message_ends_too(site: Site, under: str) -> None:
    last = chain(site.theirs("save", 1, under, queue="idefics"), site.theirs("save", under)).apply_async()
    assert last.get(timeout=PATIENCE_S, propagate=False).args[0] == "invalid_request"
    parts = [site.ours(), site.theirs("number", 1, queue="idefics")]
    joined = chord(parts, app=site.app)(site.theirs("join", under))
    assert type(joined.get(timeout=PATIENCE_S, propagate=False)).__name__ == "ChordError"
    mourned = site.theirs("number", 1).apply_async(queue="idefics", link_error=site.theirs("mourn", under))
    assert site.noted(under) == mourned.id


def test_a_misrouted_message_of_protocol_1_is_kept(site: Site, under: str) -> None:
    other = Site(site.server, is_routed=False)
    other.app.conf.task_protocol = 1
    lost = other.theirs("save", {"text": "x"}, under).apply_async(queue="idefics")
    assert lost.get(timeout=PATIENCE_S, propagate=False).args[0] == "invalid_request"
    other.close()
    # To the default queue of Celery, with no word.
    Client(site.server.url).retry(lost.id)
    assert site.noted(under) == {"text": "x"}
