"""Jobs with a countdown wait in Redis: none holds a worker up, none is lost, and each runs on time."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from celery import chord
from celery.result import AsyncResult

from tasks import Client
from tests.support.gallery import Gallery
from tests.support.stand import Producer, Stand, stand
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack

#: A job later than that was not on time, on a machine that does other things too.
LATE_S = 10.0
#: Jobs with a countdown that stopped a worker which held them.
FLOOD = 10_200


@pytest.fixture
def producer(server: stack.Broker) -> Producer:
    return Producer(server)


@pytest.fixture(scope="module")
def stood(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    log = tmp_path_factory.mktemp("due") / "log"
    with (
        Gallery().open() as gallery,
        stack.broker() as server,
        stand(server, gallery, log, MODEL="fake", PREFETCH="64") as stood,
    ):
        yield stood


def waiting(server: stack.Broker) -> int:
    """Jobs that wait for their time."""
    broker = server.connect()
    return sum(broker.zcard(name) for name in broker.scan_iter("idefics:due:*"))


def lateness(job: AsyncResult, at: float) -> float:
    """Seconds between a job's time and its end."""
    assert job.get(timeout=PATIENCE_S)["text"] == "llo"
    return float(job.date_done.replace(tzinfo=UTC).timestamp()) - at


def flood(server: stack.Broker, producer: Producer) -> None:
    """What a stock producer sends, by the thousand."""
    model = producer.complete().apply_async(countdown=3_600)
    with server.connect() as broker:
        message = broker.lpop("idefics").decode()
        tag = json.loads(message)["properties"]["delivery_tag"]
        with broker.pipeline() as pipe:
            for _ in range(FLOOD):
                pipe.lpush("idefics", message.replace(model.id, str(uuid.uuid4())).replace(tag, str(uuid.uuid4())))
            pipe.execute()


def test_ten_thousand_jobs_with_a_countdown_hold_neither_due_nor_urgent_jobs_up(
    server: stack.Broker, producer: Producer, gallery: Gallery, tmp_path: Path
) -> None:
    flood(server, producer)
    with stand(server, gallery, tmp_path / "log", MODEL="fake") as stood:
        sent = time.time()
        urgent = producer.complete().apply_async(priority=0)
        due = producer.complete().apply_async(eta=datetime.fromtimestamp(sent + 0.5, UTC))
        plain = producer.complete().apply_async(priority=9)
        assert [job.get(timeout=PATIENCE_S)["text"] for job in (urgent, plain, due)] == ["llo"] * 3
        assert time.time() - sent < 10
        assert waiting(server) == FLOOD
        eventually(lambda: server.connect().hlen("unacked") == 0)
        # A worker that stops has none of them to give back.
        asked = time.monotonic()
        stood.process.terminate()
        stood.process.wait(PATIENCE_S)
        assert time.monotonic() - asked < 10
    assert waiting(server) == FLOOD


def test_jobs_run_on_time(stood: Stand) -> None:
    start = time.time() + 1.0
    times = [start + 0.05 * number for number in range(40)]
    jobs = [stood.producer.complete().apply_async(eta=datetime.fromtimestamp(at, UTC)) for at in times]
    late = sorted(lateness(job, at) for job, at in zip(jobs, times, strict=True))
    assert late[0] >= 0
    assert late[-1] < LATE_S
    log = stood.log.read_text()
    begun = [log.index(f"[{job.id}] received") for job in jobs]
    assert begun == sorted(begun)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_job_runs_on_time_after_its_worker_was_ended(
    server: stack.Broker, producer: Producer, gallery: Gallery, tmp_path: Path, end: signal.Signals
) -> None:
    began = time.time()
    with stand(server, gallery, tmp_path / "first", MODEL="fake") as first:
        # Time for the first worker to end and the second one to start.
        at = time.time() + 4 + 2 * (time.time() - began)
        job = producer.complete().apply_async(eta=datetime.fromtimestamp(at, UTC))
        eventually(lambda: waiting(server) == 1)
        first.process.send_signal(end)
        first.process.wait(PATIENCE_S)
    with stand(server, gallery, tmp_path / "second", MODEL="fake"):
        # On a slow machine the second worker may start after the job's time.
        started_late = max(0.0, time.time() - at)
        assert 0 <= lateness(job, at) < started_late + LATE_S
    assert "redelivered" not in (tmp_path / "second").read_text()


def test_a_job_that_expires_before_its_time_does_not_run(stood: Stand) -> None:
    job = stood.producer.complete().apply_async(countdown=1.0, expires=0.5)
    eventually(lambda: job.state == "REVOKED")


@pytest.mark.parametrize("by", ["revoke", "Client.cancel"])
def test_a_job_canceled_before_its_time_does_not_run(stood: Stand, by: str) -> None:
    job = stood.producer.complete().apply_async(countdown=1.5)
    eventually(lambda: waiting(stood.producer.server) > 0)
    if by == "revoke":
        job.revoke()
    else:
        Client(stood.producer.server.url).cancel(job.id)
    eventually(lambda: job.state == "REVOKED")
    assert not re.search(rf"\[{job.id}\] succeeded", stood.log.read_text())


@pytest.mark.parametrize(("by", "protocol"), [("key", 1), ("key", 2), ("revoke", 2), ("Client.cancel", 2)])
def test_a_job_canceled_hours_before_its_time_ends_at_once(stood: Stand, by: str, protocol: int) -> None:
    server = stood.producer.server
    producer = Producer(server)
    producer.app.conf.task_protocol = protocol
    # At the very same time.
    eta = datetime.now(UTC) + timedelta(hours=1)
    job, *others = [producer.complete().apply_async(eta=eta) for _ in range(20)]
    eventually(lambda: waiting(server) == server.connect().zcard("idefics:due-ids") == 20)
    if by == "key":
        server.connect(1).set(f"idefics:cancel:{job.id}", 1, ex=60)
    elif by == "revoke":
        job.revoke()
    else:
        Client(server.url).cancel(job.id)
    eventually(lambda: job.state == "REVOKED")
    assert job.get(propagate=False).args == ("revoked",)
    eventually(lambda: waiting(server) == server.connect().zcard("idefics:due-ids") == 19)
    eventually(lambda: server.connect().hlen("unacked") == 0)
    assert {other.state for other in others} == {"PENDING"}
    command = [sys.executable, "-m", "celery", "-A", "worker.app", "purge", "--force"]
    environment = {**os.environ, "IDEFICS_BROKER_URL": server.url, "IDEFICS_RESULT_BACKEND": server.results}
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd=stack.CHECKOUT)
    assert "19 messages" in said.stdout
    assert waiting(server) == server.connect().zcard("idefics:due-ids") == 0


def test_a_job_that_waits_for_its_time_is_found_among_thousands(
    server: stack.Broker, producer: Producer, gallery: Gallery, tmp_path: Path
) -> None:
    flood(server, producer)
    with stand(server, gallery, tmp_path / "log", MODEL="fake"):
        eventually(lambda: waiting(server) == FLOOD)
        job = producer.complete().apply_async(countdown=7_200)
        eventually(lambda: waiting(server) == FLOOD + 1)
        server.connect(1).set(f"idefics:cancel:{job.id}", 1, ex=60)
        eventually(lambda: job.state == "REVOKED")
        assert waiting(server) == server.connect().zcard("idefics:due-ids") == FLOOD


def test_links_and_chords_with_a_countdown_go_on(stood: Stand) -> None:
    producer = stood.producer
    second = producer.complete("Second", immutable=True, countdown=0.5, task_id=uuid.uuid4().hex)
    producer.complete().apply_async(link=second, countdown=0.5)
    assert producer.app.AsyncResult(second.options["task_id"]).get(timeout=PATIENCE_S)["text"] == "ond"
    parts = [producer.complete(countdown=delay) for delay in (0.2, 1.0)]
    joined = chord(parts, app=producer.app)(producer.complete("Joined", immutable=True, countdown=0.3))
    assert joined.get(timeout=PATIENCE_S)["text"] == "ned"


def test_a_first_protocol_producers_job_waits_too(stood: Stand) -> None:
    producer = Producer(stood.producer.server)
    producer.app.conf.task_protocol = 1
    at = time.time() + 1.0
    job = producer.complete().apply_async(eta=datetime.fromtimestamp(at, UTC))
    eventually(lambda: waiting(producer.server) == 1)
    assert 0 <= lateness(job, at) < LATE_S


def test_due_jobs_go_to_a_worker_with_kombus_own_transport(
    server: stack.Broker, producer: Producer, gallery: Gallery, tmp_path: Path
) -> None:
    began = time.time()
    with stand(server, gallery, tmp_path / "first", MODEL="fake"):
        # Time for the second worker to start.
        at = time.time() + 1 + 1.5 * (time.time() - began)
        job = producer.complete().apply_async(eta=datetime.fromtimestamp(at, UTC))
        eventually(lambda: waiting(server) == 1)
    with stand(server, gallery, tmp_path / "second", MODEL="fake", ATOMIC_RESERVE="false"):
        assert lateness(job, at) >= 0
    assert waiting(server) == 0
