"""A worker is stopped: what it has not finished is in the queue again at once, and nothing is lost or done twice.

The warm shutdown's test is in test_celery_features.py.
"""

from __future__ import annotations

import re
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from celery.result import AsyncResult

from tests.support.gallery import Gallery
from tests.support.stand import SLOTS, Producer, Stand, stand
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack

NAMES = [f"picture-{number}" for number in range(SLOTS)]


@pytest.fixture
def producer(server: stack.Broker) -> Producer:
    return Producer(server)


def held_jobs(stood: Stand) -> list[AsyncResult]:
    """As many as the worker takes, and it has them all: they go on when the gallery lets them."""
    jobs = [stood.producer.show(stood.gallery.held(name)).apply_async() for name in NAMES]
    stood.gallery.await_requests(*NAMES)
    return jobs


def ended(stood: Stand, timeout: float) -> float:
    """Seconds until the worker is gone."""
    asked = time.monotonic()
    stood.process.wait(timeout)
    return time.monotonic() - asked


def unacknowledged(server: stack.Broker) -> int:
    return int(server.connect().hlen("unacked"))


def successes(*logs: Path) -> Counter[str]:
    """How often each job succeeded, by its id."""
    said = "".join(log.read_text() for log in logs)
    return Counter(re.findall(r"Task idefics\.complete\[(\S+)\] succeeded", said))


def test_a_cold_shutdown_puts_every_job_back_at_once_and_the_next_worker_goes_on(
    server: stack.Broker, producer: Producer, gallery: Gallery, tmp_path: Path
) -> None:
    logs = tmp_path / "first", tmp_path / "second"
    with stand(server, gallery, logs[0], SOFT_SHUTDOWN_TIMEOUT_S="0") as first:
        jobs = held_jobs(first) + [producer.complete().apply_async() for _ in range(3)]
        first.process.send_signal(signal.SIGQUIT)
        assert ended(first, timeout=10) < 5
    assert producer.queued() == len(jobs)
    assert unacknowledged(server) == 0
    gallery.release()
    with stand(server, gallery, logs[1]):
        assert [job.get(timeout=PATIENCE_S)["text"] for job in jobs] == ["llo"] * len(jobs)
    assert successes(*logs) == {job.id: 1 for job in jobs}


def test_a_soft_shutdown_waits_for_what_ends_in_its_time_and_puts_the_rest_back(
    server: stack.Broker, producer: Producer, gallery: Gallery, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with stand(server, gallery, log, SOFT_SHUTDOWN_TIMEOUT_S="1.5") as stood:
        *late, soon = held_jobs(stood)
        queued = [producer.complete().apply_async() for _ in range(3)]
        stood.process.send_signal(signal.SIGQUIT)
        eventually(lambda: "Hitting Ctrl+C again" in log.read_text())
        gallery.release(NAMES[-1])
        assert 1 < ended(stood, timeout=10) < 6
    assert soon.state == "SUCCESS"
    assert producer.queued() == len(late + queued)
    assert unacknowledged(server) == 0
    assert successes(log) == {soon.id: 1}


def test_a_container_stop_loses_nothing_and_duplicates_nothing(
    server: stack.Broker, producer: Producer, gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As docker-compose.yml has it.
    monkeypatch.setenv("REMAP_SIGTERM", "SIGQUIT")
    logs = tmp_path / "first", tmp_path / "second"
    fast = {"MODEL": "fake:0.005"}
    with stand(server, gallery, logs[0], "--hostname", "first@%h", SOFT_SHUTDOWN_TIMEOUT_S="1", **fast) as first:
        # These three do not end in time.
        accepted = held_jobs(first)
        gallery.release(NAMES[-1])
        with stand(server, gallery, logs[1], "--hostname", "second@%h", **fast):
            accepted += [producer.complete("Hello" * 8, tokens=1 + number % 40).apply_async() for number in range(80)]
            eventually(lambda: len(successes(logs[0])) > 1 and successes(logs[1]))
            first.process.send_signal(signal.SIGTERM)
            accepted += [producer.complete().apply_async() for _ in range(20)]
            assert ended(first, timeout=10) < 5
            gallery.release()
            assert all(job.get(timeout=PATIENCE_S)["text"] for job in accepted)
    assert successes(*logs) == {job.id: 1 for job in accepted}
    assert producer.queued() == unacknowledged(server) == 0
