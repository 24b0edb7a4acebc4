"""The model process dies, hangs or cannot be loaded: no job is lost, and only a culprit fails."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tasks import Client, Complete, JobError, SubmittedJob
from tests.support.gallery import Gallery
from tests.support.pictures import data_uri, png
from tests.support.redis_servers import SeparateResults
from tests.support.stand import Producer, Stand, stand
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack
from worker.models.fake import DEVICE_LOST, POISON, POISON_COLOUR


@pytest.fixture(scope="module")
def stood(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """A worker with as many slots as by default, that takes a model process for hung soon."""
    log = tmp_path_factory.mktemp("deaths") / "log"
    with (
        Gallery().open() as gallery,
        stack.broker() as server,
        stand(server, gallery, log, MODEL="fake:0.01", PREFETCH="64", HANG_TIMEOUT_S="3") as stood,
    ):
        yield stood


@pytest.fixture(scope="module")
def client(stood: Stand) -> Client:
    return Client(stood.producer.server.url)


def complete(text: str, tokens: int = 3) -> Complete:
    return Complete(prompt=[text], max_new_tokens=tokens)


@pytest.mark.parametrize(
    "death",
    [
        pytest.param(signal.SIGKILL, id="kill -9"),
        pytest.param(signal.SIGSEGV, id="segfault"),
        # An allocator's last word. The kernel's is kill -9.
        pytest.param(signal.SIGABRT, id="out of memory"),
        # The process stands still, and says nothing any more.
        pytest.param(signal.SIGSTOP, id="hang"),
    ],
)
def test_jobs_in_flight_run_again_after(death: signal.Signals, stood: Stand, client: Client) -> None:
    process = stood.producer.model_process()
    jobs = client.submit_many(complete(f"{'-' * 30}{number}", 30) for number in range(3))
    eventually(lambda: all(job.status == "processing" for job in jobs))
    os.kill(process, death)
    assert [job.result(timeout=PATIENCE_S).text[-1] for job in jobs] == ["0", "1", "2"]
    assert stood.producer.model_process() not in (0, process)
    assert not psutil.pid_exists(process)


@pytest.mark.parametrize("frozen", ["broker", "worker"])
def test_a_model_process_is_not_replaced_after_a_standstill_of_its(frozen: str, stood: Stand, client: Client) -> None:
    model, server = stood.producer.model_process(), stood.producer.server
    pids = [server.process.pid] if frozen == "broker" else [stood.process.pid, model]
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in pids:
            os.kill(pid, number)
        if number == signal.SIGSTOP:
            # Longer than the hang timeout.
            time.sleep(4.0)
    assert client.submit(complete("a")).result(timeout=PATIENCE_S).text == "a"
    assert stood.producer.model_process() == model


def test_a_worker_without_a_model_process_leaves_jobs_in_the_queue(stood: Stand, client: Client) -> None:
    loadings = stood.log.read_text().count("Loading")
    os.kill(stood.producer.model_process(), signal.SIGKILL)
    eventually(lambda: stood.log.read_text().count("Loading") > loadings)
    (loading,) = psutil.Process(stood.process.pid).children()
    loading.suspend()
    jobs = client.submit_many(map(complete, "abc"))
    # For ten times as long as a job lies in an idle worker's queue.
    time.sleep(0.3)
    assert stood.producer.queued() == 3
    loading.resume()
    assert [job.result(timeout=PATIENCE_S).text for job in jobs] == ["a", "b", "c"]


def test_two_poisonous_jobs_among_100_fail_as_worker_lost_and_98_succeed(stood: Stand, client: Client) -> None:
    deaths = stood.log.read_text().count("The model process ended")
    texts = [f"{number:03}" for number in range(100)]
    texts[20] = texts[55] = POISON
    jobs = client.submit_many(map(complete, texts))
    outcomes = [outcome(job) for job in jobs]
    assert outcomes == [text if text != POISON else "worker_lost" for text in texts]
    assert stood.log.read_text().count("The model process ended") - deaths <= 12, "too many deaths"


def test_after_an_error_that_breaks_the_device_another_process_runs_the_innocent_jobs(
    stood: Stand, client: Client
) -> None:
    process = stood.producer.model_process()
    texts = [f"{number:02}" for number in range(30)]
    texts[11] = DEVICE_LOST
    jobs = client.submit_many(map(complete, texts))
    assert [outcome(job) for job in jobs] == [text if text != DEVICE_LOST else "worker_lost" for text in texts]
    assert stood.producer.model_process() not in (0, process)
    assert "The device is lost: CUDA error: device-side assert triggered." in stood.log.read_text()


def test_a_picture_whose_decoding_kills_the_process_costs_its_own_job_only(stood: Stand, client: Client) -> None:
    colours = [(number, 10, 200) for number in range(20)]
    colours[7] = POISON_COLOUR
    jobs = client.submit_many(Complete(prompt=[data_uri(png(colour)), "fine"], max_new_tokens=4) for colour in colours)
    assert [outcome(job) for job in jobs] == [
        "fine" if colour != POISON_COLOUR else "worker_lost" for colour in colours
    ]


def outcome(job: SubmittedJob) -> str:
    try:
        return job.result(timeout=120).text
    except JobError as error:
        return error.code


def test_a_process_that_dies_while_it_loads_is_started_again_three_times_and_then_the_worker_exits(
    stood: Stand, tmp_path: Path
) -> None:
    log, server = tmp_path / "log", stood.producer.server
    environment = {**os.environ, "IDEFICS_MODEL": "fake", "IDEFICS_RESTART_BACKOFF_S": "0.02"}
    environment |= {"IDEFICS_BROKER_URL": server.url, "IDEFICS_RESULT_BACKEND": server.results}
    command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker"]
    started: set[int] = set()
    with stack.started(command, log=log, environment=environment) as process:
        while process.poll() is None:
            for child in psutil.Process(process.pid).children():
                with contextlib.suppress(psutil.Error):
                    # The parent's imports start programs of their own, such as uname.
                    if "worker.model_process" in child.cmdline():
                        started.add(child.pid)
                        child.kill()
            time.sleep(0.02)
        assert process.returncode not in (0, -signal.SIGKILL)
    assert len(started) == 4
    assert "The model process died 4 times while loading" in log.read_text()
    assert "The model is ready" not in log.read_text()


def test_a_worker_that_dies_while_it_stores_a_failure_leaves_the_job_to_another(tmp_path: Path) -> None:
    with Gallery().open() as gallery, stack.broker() as queues, stack.broker() as results:
        server = SeparateResults(queues.port, process=queues.process, results_server=results)
        job = Producer(server).complete("-" * 200, 200, time_limit=2.0)
        with stand(server, gallery, tmp_path / "first", VISIBILITY_TIMEOUT_S="2") as first:
            outcome = job.apply_async()
            eventually(lambda: outcome.state == "STARTED")
            results.process.send_signal(signal.SIGSTOP)
            # The limit passes, and the failure cannot be stored.
            time.sleep(3.0)
            first.process.kill()
            results.process.send_signal(signal.SIGCONT)
        with stand(server, gallery, tmp_path / "second", VISIBILITY_TIMEOUT_S="2"):
            assert outcome.get(timeout=PATIENCE_S, propagate=False).args[0] == "deadline_exceeded"
