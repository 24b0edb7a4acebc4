"""What a silent worker held comes back to the queue, by the server's clock; what a living one holds stays with it."""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path

import pytest

from tests.support.gallery import Gallery
from tests.support.stand import Producer, Stand, stand
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack

#: Puts every clock of a Python process two hours ahead, but those that only run.
AHEAD = "import time; real = time.time; time.time = lambda: real() + 7200"
#: Visibility timeout of the workers here.
TIMEOUT_S = 2


@pytest.fixture
def producer(server: stack.Broker) -> Producer:
    return Producer(server)


def name() -> str:
    return uuid.uuid4().hex[:8]


def worker_options(number: int) -> tuple[str, ...]:
    return ("--hostname", f"w{number}@%h")


def test_a_worker_whose_clock_is_hours_ahead_takes_no_job_from_another(
    server: stack.Broker, gallery: Gallery, producer: Producer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = name()
    with stand(server, gallery, tmp_path / "first", *worker_options(1)):
        job = producer.show(gallery.held(shown)).apply_async()
        gallery.await_requests(shown)
        (tmp_path / "ahead").mkdir()
        (tmp_path / "ahead" / "sitecustomize.py").write_text(AHEAD)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "ahead"), prepend=":")
        with stand(server, gallery, tmp_path / "second", *worker_options(2), VISIBILITY_TIMEOUT_S="40"):
            eventually(lambda: len(server.connect().client_list()) > 4)
            # More than one of its sweeps.
            time.sleep(12)
            gallery.release(shown)
            assert job.get(timeout=PATIENCE_S)["text"] == "llo"
    assert gallery.asked.count(shown) == 1


@pytest.mark.parametrize("is_stopped", [False, True], ids=["that runs", "that is asked to stop"])
def test_a_job_may_last_longer_than_the_visibility_timeout_in_a_worker(
    server: stack.Broker, gallery: Gallery, producer: Producer, tmp_path: Path, is_stopped: bool
) -> None:
    shown, settings = name(), {"VISIBILITY_TIMEOUT_S": str(TIMEOUT_S)}
    with stand(server, gallery, tmp_path / "first", *worker_options(1), **settings) as first:
        job = producer.show(gallery.held(shown)).apply_async()
        gallery.await_requests(shown)
        with stand(server, gallery, tmp_path / "second", *worker_options(2), **settings):
            if is_stopped:
                first.process.terminate()
            time.sleep(3 * TIMEOUT_S)
            gallery.release(shown)
            assert job.get(timeout=PATIENCE_S)["text"] == "llo"
    assert gallery.asked.count(shown) == 1


def test_a_job_without_a_result_whose_worker_died_leaves_no_count_behind(
    server: stack.Broker, gallery: Gallery, producer: Producer, tmp_path: Path
) -> None:
    shown, settings = name(), {"VISIBILITY_TIMEOUT_S": str(TIMEOUT_S)}
    with stand(server, gallery, tmp_path / "first", *worker_options(1), **settings) as first:
        job = producer.show(gallery.held(shown)).apply_async(ignore_result=True)
        gallery.await_requests(shown)
        first.process.kill()
        first.process.wait(PATIENCE_S)
    broker = server.connect()
    with stand(server, gallery, tmp_path / "second", *worker_options(2), **settings):
        eventually(lambda: gallery.asked.count(shown) == 2)
        assert broker.hgetall(f"idefics:redeliveries:{job.id}") == {b"0": b"1", b"0:1": b"1"}
        gallery.release(shown)
        eventually(lambda: broker.hlen("unacked") == 0)
        assert not broker.exists(f"idefics:redeliveries:{job.id}")


def forged(stood: Stand, text: str) -> str:
    """A job that says of itself that it came back."""
    producer, queue = stood.producer, name()
    job = producer.complete(text).apply_async(queue=queue)
    with producer.server.connect() as broker:
        message = json.loads(broker.lpop(queue) or b"")
        message["headers"]["redelivered"] = True
        message["properties"]["delivery_info"] |= {"redelivered": True, "routing_key": "idefics"}
        broker.lpush("idefics", json.dumps(message))
    return str(job.id)


def test_a_job_that_claims_to_be_redelivered_runs_beside_the_others(
    server: stack.Broker, gallery: Gallery, producer: Producer, tmp_path: Path
) -> None:
    shown = name()
    # Such that one death is enough for a suspicion.
    with stand(server, gallery, tmp_path / "log", MAX_WORKER_DEATHS="2") as stood:
        held = producer.show(gallery.held(shown)).apply_async()
        gallery.await_requests(shown)
        liar = producer.app.AsyncResult(forged(stood, "Hello"))
        assert liar.get(timeout=PATIENCE_S)["text"] == "llo"
        gallery.release(shown)
        assert held.get(timeout=PATIENCE_S)["text"] == "llo"
    assert server.connect().keys("idefics:redeliveries:*") + server.connect(1).keys("idefics:redeliveries:*") == []
