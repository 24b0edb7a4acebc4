"""Our tasks are ordinary Celery tasks: what Celery offers works, from a producer that knows their names only."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from celery import chain, chord, group
from celery.events import EventReceiver
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult

from tests.support.gallery import Gallery
from tests.support.stand import SLOTS, Producer, Stand, stand
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack


def text(job: AsyncResult) -> str:
    return str(job.get(timeout=PATIENCE_S)["text"])


def name() -> str:
    return uuid.uuid4().hex[:8]


@pytest.fixture
def busy(held_up: Stand) -> Iterator[list[AsyncResult]]:
    """The worker's slots are full: jobs sent now wait in the queue until `release`."""
    names = [name() for _ in range(SLOTS)]
    jobs = [held_up.producer.show(held_up.gallery.held(one)).apply_async() for one in names]
    held_up.gallery.await_requests(*names)
    yield jobs
    held_up.gallery.release()
    for job in jobs:
        job.get(timeout=PATIENCE_S)


# --- Links, errbacks and the canvas ---------------------------------------------------------------


def test_a_link_gets_the_answer(producer: Producer, backend: None) -> None:
    under = name()
    producer.complete(link=producer.shop("keep", under)).apply_async()
    answer = json.loads(producer.kept(under))
    assert answer["text"] == "llo"
    assert answer["finish_reason"] == "length"


def test_an_errback_hears_of_a_failed_job(producer: Producer, backend: None) -> None:
    under = name()
    job = producer.complete(tokens=-1, link_error=producer.shop("keep", under)).apply_async()
    assert json.loads(producer.kept(under)) == job.id
    error = job.get(timeout=PATIENCE_S, propagate=False)
    assert type(error).__name__ == "InvalidRequest"
    assert error.args[0] == "invalid_request"


def test_a_link_stays_silent_when_its_job_fails(producer: Producer, backend: None) -> None:
    fine, bad = name(), name()
    job = producer.complete(
        tokens=-1, link=producer.shop("keep", fine), link_error=producer.shop("keep", bad)
    ).apply_async()
    assert json.loads(producer.kept(bad)) == job.id
    assert not producer.server.connect(2).exists(fine)


def test_a_chain_hands_the_answer_to_the_next_task(producer: Producer, backend: None) -> None:
    job = chain(producer.complete(), producer.shop("shout")).apply_async()
    assert job.get(timeout=PATIENCE_S) == "LLO"


def test_a_job_is_a_later_link_of_a_chain_when_it_is_immutable(producer: Producer, backend: None) -> None:
    job = chain(producer.shop("keep", "ignored", name()), producer.complete(immutable=True)).apply_async()
    assert text(job) == "llo"


def test_a_job_that_is_handed_an_argument_says_how_to_chain_it(producer: Producer, backend: None) -> None:
    job = chain(producer.shop("keep", "unwanted", name()), producer.complete()).apply_async()
    error = job.get(timeout=PATIENCE_S, propagate=False)
    assert error.args[0] == "invalid_request"
    assert "signature.si" in error.args[1]


def test_a_group_answers_in_order(producer: Producer) -> None:
    words = [f"word-{number:03}" for number in range(20)]
    jobs = group([producer.complete(word) for word in words], app=producer.app).apply_async()
    assert [answer["text"] for answer in jobs.get(timeout=PATIENCE_S)] == [word[-3:] for word in words]


def test_a_chord_calls_back_with_all_answers(producer: Producer, backend: None) -> None:
    words = [f"word-{number:03}" for number in range(10)]
    job = chord([producer.complete(word) for word in words], app=producer.app)(producer.shop("join"))
    assert job.get(timeout=PATIENCE_S) == "+".join(word[-3:] for word in words)


def test_a_chord_with_a_failed_job_fails_and_does_not_hang(producer: Producer, backend: None) -> None:
    job = chord([producer.complete(), producer.complete(tokens=-1)], app=producer.app)(producer.shop("join"))
    error = job.get(timeout=PATIENCE_S, propagate=False)
    assert type(error).__name__ == "ChordError"


# --- Retries --------------------------------------------------------------------------------------


def test_a_job_whose_image_is_unreachable_for_a_while_is_retried_and_succeeds(held_up: Stand) -> None:
    shown = name()
    job = held_up.producer.show(held_up.gallery.broken(shown, times=2)).apply_async()
    assert text(job) == "llo"
    assert held_up.gallery.asked.count(shown) == 3
    assert job.retries == 2


def test_a_job_whose_image_stays_unreachable_fails_after_its_retries(held_up: Stand) -> None:
    shown = name()
    job = held_up.producer.show(held_up.gallery.broken(shown, times=99)).apply_async()
    error = job.get(timeout=PATIENCE_S, propagate=False)
    assert job.state == "FAILURE"
    assert type(error).__name__ == "ImageUnreachable"
    assert error.args[0] == "image_unreachable"
    assert held_up.gallery.asked.count(shown) == 4


# --- Time -----------------------------------------------------------------------------------------


def test_a_countdown_delays_the_start(producer: Producer) -> None:
    sent = time.monotonic()
    job = producer.complete().apply_async(countdown=1.0)
    assert text(job) == "llo"
    assert time.monotonic() - sent >= 1.0


def test_an_eta_delays_the_start(producer: Producer) -> None:
    eta = datetime.now(UTC) + timedelta(seconds=1)
    job = producer.complete().apply_async(eta=eta)
    assert text(job) == "llo"
    assert datetime.now(UTC) >= eta


def test_a_job_that_expires_in_the_queue_is_revoked_and_does_not_run(held_up: Stand, busy: list[AsyncResult]) -> None:
    shown = name()
    job = held_up.producer.show(held_up.gallery.picture(shown)).apply_async(expires=0.2)
    # Nothing tells that it has expired: that shows when it is taken.
    time.sleep(0.4)
    held_up.gallery.release()
    with pytest.raises(TaskRevokedError):
        job.get(timeout=PATIENCE_S)
    assert job.state == "REVOKED"
    assert shown not in held_up.gallery.asked


def test_a_job_that_has_not_expired_runs(producer: Producer) -> None:
    assert text(producer.complete().apply_async(expires=60)) == "llo"


@pytest.mark.parametrize("compression", ["gzip", "bzip2"])
def test_a_compressed_job_is_run(held_up: Stand, compression: str) -> None:
    assert held_up.producer.complete().apply_async(compression=compression).get(timeout=PATIENCE_S)["text"] == "llo"


def test_a_soft_limit_ends_a_job_with_its_text_so_far(held_up: Stand) -> None:
    job = held_up.producer.complete("Hello" * 100, tokens=300, soft_time_limit=0.5).apply_async()
    answer = job.get(timeout=PATIENCE_S)
    assert answer["finish_reason"] == "deadline"
    assert 0 < len(answer["text"]) < 300


def test_a_hard_limit_fails_its_job_alone(held_up: Stand) -> None:
    fine, stuck = name(), name()
    neighbour = held_up.producer.show(held_up.gallery.held(fine)).apply_async()
    job = held_up.producer.show(held_up.gallery.held(stuck)).apply_async(time_limit=1.0)
    held_up.gallery.await_requests(fine, stuck)
    error = job.get(timeout=PATIENCE_S, propagate=False)
    assert error.args[0] == "deadline_exceeded"
    held_up.gallery.release()
    assert text(neighbour) == "llo"


# --- Revocation -----------------------------------------------------------------------------------


def test_a_job_revoked_before_its_start_does_not_run(held_up: Stand, busy: list[AsyncResult]) -> None:
    shown = name()
    job = held_up.producer.show(held_up.gallery.picture(shown)).apply_async()
    job.revoke()
    eventually(lambda: job.id in _revoked(held_up))
    held_up.gallery.release()
    with pytest.raises(TaskRevokedError):
        job.get(timeout=PATIENCE_S)
    assert shown not in held_up.gallery.asked


def test_a_chord_fails_whose_job_is_revoked_before_its_start(held_up: Stand, busy: list[AsyncResult]) -> None:
    part = held_up.producer.complete()
    revoked = str(part.freeze().id)
    joined = chord([held_up.producer.complete(), part], app=held_up.producer.app)(held_up.producer.shop("join"))
    held_up.producer.app.control.revoke(revoked)
    eventually(lambda: revoked in _revoked(held_up))
    held_up.gallery.release()
    assert type(joined.get(timeout=PATIENCE_S, propagate=False)).__name__ == "ChordError"


def test_a_job_revoked_while_the_model_runs_it_ends_at_once(held_up: Stand) -> None:
    process = held_up.producer.model_process()
    job = held_up.producer.complete("Hello", tokens=500).apply_async()
    eventually(lambda: job.state == "STARTED")
    job.revoke(terminate=True)
    with pytest.raises(TaskRevokedError):
        job.get(timeout=PATIENCE_S)
    # The 500 tokens take 10 s. The model is free for the next job long before, in the same process.
    sent = time.monotonic()
    assert text(held_up.producer.complete().apply_async()) == "llo"
    assert time.monotonic() - sent < 3.0
    assert job.state == "REVOKED"
    assert held_up.producer.model_process() == process


def test_a_job_revoked_while_its_image_loads_does_not_reach_the_model(held_up: Stand) -> None:
    shown = name()
    job = held_up.producer.show(held_up.gallery.held(shown)).apply_async()
    held_up.gallery.await_requests(shown)
    job.revoke(terminate=True)
    with pytest.raises(TaskRevokedError):
        job.get(timeout=PATIENCE_S)
    held_up.gallery.release()
    eventually(lambda: held_up.producer.stats()["pool"]["in-flight"] == 0)
    assert job.state == "REVOKED"


def _revoked(held_up: Stand) -> list[str]:
    answers = held_up.producer.app.control.inspect(timeout=0.5).revoked() or {}
    return [id for ids in answers.values() for id in ids]


# --- Results and events ---------------------------------------------------------------------------


def test_an_ignored_result_is_not_stored(producer: Producer, backend: None) -> None:
    under = name()
    job = producer.complete(link=producer.shop("keep", under)).apply_async(ignore_result=True)
    assert json.loads(producer.kept(under))["text"] == "llo"
    assert not producer.server.connect(1).exists(f"celery-task-meta-{job.id}")


def test_another_process_reads_the_answer_by_the_jobs_id(producer: Producer) -> None:
    job = producer.complete().apply_async()
    code = (
        "import sys; from celery import Celery; "
        "app = Celery('other', broker=sys.argv[1], backend=sys.argv[2]); "
        "print(app.AsyncResult(sys.argv[3]).get(timeout=120)['text'])"
    )
    command = [sys.executable, "-c", code, producer.server.url, producer.server.results, job.id]
    said = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert said.stdout.strip() == "llo"


def test_a_job_sends_celerys_events(producer: Producer) -> None:
    with _events(producer) as events:
        job = producer.complete().apply_async()
        eventually(lambda: "task-succeeded" in events[job.id])
    assert events[job.id] == ["task-received", "task-started", "task-succeeded"]


def test_a_failed_and_a_retried_job_send_their_events(held_up: Stand) -> None:
    with _events(held_up.producer) as events:
        job = held_up.producer.show(held_up.gallery.broken(name(), times=1)).apply_async()
        bad = held_up.producer.complete(tokens=-1).apply_async()
        eventually(lambda: "task-succeeded" in events[job.id] and "task-failed" in events[bad.id])
    assert "task-retried" in events[job.id]


@contextmanager
def _events(producer: Producer) -> Iterator[dict[str, list[str]]]:
    """The types of each job's events, by its id, as they come."""
    events: dict[str, list[str]] = defaultdict(list)
    listening = threading.Event()

    def hear(event: dict[str, Any]) -> None:
        # The worker was asked for a heartbeat: it comes once we are heard.
        listening.set()
        events[event.get("uuid", "worker")].append(event["type"])

    with producer.app.connection() as connection:
        receiver: EventReceiver = producer.app.events.Receiver(connection, handlers={"*": hear})
        thread = threading.Thread(target=receiver.capture, kwargs={"wakeup": True}, daemon=True)
        thread.start()
        assert listening.wait(PATIENCE_S)
        yield events
        receiver.should_stop = True
        thread.join(PATIENCE_S)


# --- Priorities and the queue ---------------------------------------------------------------------


def test_an_urgent_job_overtakes_those_that_wait(held_up: Stand, busy: list[AsyncResult]) -> None:
    late, soon = name(), name()
    jobs = [
        held_up.producer.show(held_up.gallery.picture(late)).apply_async(priority=9),
        held_up.producer.show(held_up.gallery.picture(soon)).apply_async(priority=0),
    ]
    eventually(lambda: held_up.producer.queued() == 2)
    # One slot is free from now on: they run one after the other.
    held_up.gallery.release(held_up.gallery.asked[-1])
    assert [text(job) for job in jobs] == ["llo", "llo"]
    assert held_up.gallery.asked[-2:] == [soon, late]


def test_a_worker_started_without_a_flag_has_one_process_and_reads_our_queue(held_up: Stand) -> None:
    banner = held_up.log.read_text()
    assert "concurrency: 1 " in banner
    assert "idefics          exchange=idefics(direct) key=idefics" in banner
    queues = held_up.producer.app.control.inspect(timeout=1.0).active_queues() or {}
    assert [[queue["name"] for queue in of_worker] for of_worker in queues.values()] == [["idefics"]]
    assert held_up.producer.stats()["pool"]["implementation"] == "worker.pool.pool:InferencePool"


# --- Ends -----------------------------------------------------------------------------------------


def test_jobs_survive_the_death_of_the_model_process(held_up: Stand, busy: list[AsyncResult]) -> None:
    waiting = [held_up.producer.complete(f"word-{number}").apply_async() for number in range(4)]
    process = held_up.producer.model_process()
    psutil.Process(process).kill()
    held_up.gallery.release()
    assert [text(job) for job in busy] == ["llo"] * SLOTS
    assert [text(job) for job in waiting] == ["d-0", "d-1", "d-2", "d-3"]
    assert held_up.producer.model_process() not in (0, process)


def test_a_warm_shutdown_ends_what_runs_and_leaves_the_rest_to_the_next_worker(tmp_path: Path) -> None:
    shown = [name() for _ in range(SLOTS)]
    with Gallery().open() as gallery, stack.broker() as server:
        producer = Producer(server)
        with stand(server, gallery, tmp_path / "first") as first:
            running = [producer.show(gallery.held(one)).apply_async() for one in shown]
            gallery.await_requests(*shown)
            queued = [producer.complete().apply_async() for _ in range(5)]
            _shut_down(first, gallery)
        assert [job.state for job in running] == ["SUCCESS"] * SLOTS
        assert [job.state for job in queued] == ["PENDING"] * 5
        assert producer.queued() == 5
        with stand(server, gallery, tmp_path / "second"):
            assert [text(job) for job in queued] == ["llo"] * 5


def _shut_down(stood: Stand, gallery: Gallery) -> None:
    """Ask for a warm shutdown, and let the running jobs go on once the worker has heard."""
    stood.process.send_signal(signal.SIGTERM)
    eventually(lambda: "Warm shutdown" in stood.log.read_text())
    gallery.release()
    assert stood.process.wait(PATIENCE_S) == 0
