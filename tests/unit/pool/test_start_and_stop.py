"""The pool's start and shutdown, its event loop, and its state file."""

from __future__ import annotations

import time

import pytest
from celery.exceptions import WorkerShutdown
from celery.platforms import EX_FAILURE
from celery.worker import state as worker_state
from kombu.asynchronous import Hub

from tests.unit.pool.bench import HANG_S, SOON, THREADS, Bench, StubProcess, broken, dying, loading
from worker.pool import pool as pool_module
from worker.pool import supervisor
from worker.pool.job import JobState
from worker.pool.wire import (
    Heartbeat,
    Ready,
    Stop,
)

# Starting


def test_the_pool_starts_once_the_model_answers(bench: Bench) -> None:
    bench.start()
    assert bench.pool.info["ready"] is True
    assert bench.pool.info["processes"] == [1000]
    assert bench.pool.info["max-concurrency"] == THREADS


def test_a_model_that_cannot_be_served_stops_the_worker(bench: Bench) -> None:
    bench.scripts = [broken]
    with pytest.raises(WorkerShutdown) as stopped:
        bench.pool.start()
    assert stopped.value.code == EX_FAILURE
    assert len(bench.processes) == 1


def test_a_model_that_can_no_longer_be_served_stops_the_worker_for_good(
    started: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RESTART_DELAYS", (0.0, 0.0, 0.0))
    started.scripts = [broken, broken, broken]
    started.process.die()
    started.until(lambda: worker_state.should_stop is not None)
    assert worker_state.should_stop == EX_FAILURE
    started.settle()
    assert len(started.processes) == 2


def test_a_process_that_dies_while_it_loads_is_started_again_with_a_growing_delay(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RESTART_DELAYS", (0.05, 0.2))
    bench.scripts = [dying, dying]
    bench.pool.start()
    first, second, third = (process.started_at for process in bench.processes)
    assert second - first >= 0.05
    assert third - second >= 0.2
    assert bench.process.is_ready


def test_the_delays_grow_by_default() -> None:
    delays = supervisor.RESTART_DELAYS
    assert len(delays) >= 2
    assert list(delays) == sorted(delays)
    assert delays[0] > 0


def test_a_process_that_always_dies_while_it_loads_stops_the_worker(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RESTART_DELAYS", (0.0, 0.0, 0.0))
    bench.scripts = [dying] * 10
    with pytest.raises(WorkerShutdown) as stopped:
        bench.pool.start()
    assert stopped.value.code == EX_FAILURE
    assert len(bench.processes) == 4


def test_a_process_that_loads_for_too_long_is_replaced_and_the_log_names_the_setting(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "RESTART_DELAYS", (0.0,))

    def stuck(process: StubProcess) -> None:
        process.started_at -= 1_000_000

    bench.scripts = [stuck]
    bench.pool.start()
    assert bench.processes[0].is_killed
    assert len(bench.processes) == 2
    assert "did not load within IDEFICS_LOAD_TIMEOUT_S" in caplog.text


def test_a_process_that_was_ready_starts_the_count_anew(started: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "RESTART_DELAYS", (0.0,))
    for _ in range(3):
        started.scripts = [dying]
        known = len(started.processes)
        started.process.die()
        started.until(lambda known=known: len(started.processes) == known + 2 and started.process.is_ready)
    assert worker_state.should_stop is None


# Closing


def test_a_closed_pool_takes_no_job(started: Bench) -> None:
    started.pool.close()
    (request,) = started.submit("a")
    assert request.job is None
    assert started.process.ran == []


def test_a_job_that_ends_after_the_close_is_reported_and_frees_no_place(started: Bench) -> None:
    (request,) = started.submit("a")
    started.pool.close()
    started.process.finish("a")
    started.until(lambda: request.told)
    assert request.kinds == ["success"]
    assert started.semaphore.releases == 0


def test_a_warm_shutdown_waits_for_what_runs_and_then_ends_the_process(started: Bench) -> None:
    (request,) = started.submit("a")
    started.pool.close()
    process = started.process
    process.finish("a")
    started.pool.stop()
    assert request.kinds == ["success"]
    assert process.heard[-1] == Stop()
    assert started.semaphore.releases == 0


def test_a_soft_shutdown_is_over_when_the_last_running_job_is(started: Bench) -> None:
    (request,) = started.submit("a")
    started.process.finish("a")
    began = time.monotonic()
    started.pool.drain(timeout=60)
    assert time.monotonic() - began < SOON
    assert request.kinds == ["success"]


def test_a_soft_shutdown_waits_no_longer_than_its_time(started: Bench) -> None:
    (request,) = started.submit("a")
    began = time.monotonic()
    started.pool.drain(timeout=0.1)
    assert 0.1 <= time.monotonic() - began < SOON
    assert request.told == []


def test_a_cold_shutdown_does_not_wait_for_a_job_that_does_not_end(
    started: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "LEAVE_S", 0.1)
    monkeypatch.setattr(worker_state, "should_terminate", True)
    (request,) = started.submit("a")
    request.job.terminate()  # type: ignore[union-attr]
    began = time.monotonic()
    started.pool.stop()
    assert time.monotonic() - began < SOON
    assert request.told == []


def test_a_cold_shutdown_reports_nothing_so_that_every_job_goes_back(started: Bench) -> None:
    (request,) = started.submit("a")
    started.pool.terminate()
    assert request.told == []
    assert started.semaphore.releases == 0


def test_a_death_after_the_close_starts_no_process(started: Bench) -> None:
    (request,) = started.submit("a")
    started.pool.close()
    started.process.die()
    started.settle()
    assert len(started.processes) == 1
    assert request.told == []


# The event loop


def test_no_message_is_lost_when_a_reconnect_replaces_the_event_loop(started: Bench) -> None:
    (request,) = started.submit("a")
    old, started.hub = started.hub, Hub()
    old.close()
    started.pool.register_with_event_loop(started.hub)
    started.process.finish("a")
    started.until(lambda: request.told)
    assert request.kinds == ["success"]


def test_a_process_that_reads_slowly_does_not_block_the_loop(started: Bench) -> None:
    body = b"x" * 1_000_000
    started.pool.apply_async(
        None,
        ("idefics.caption", "big", {"retries": 0}, body, "application/json", "utf-8"),
        accept_callback=print,
        callback=print,
        error_callback=print,
    )
    assert started.process.channel.has_unsent
    started.until(lambda: started.process.ran == ["big"])
    assert not started.process.channel.has_unsent


def test_terminating_by_process_id_does_nothing(started: Bench) -> None:
    (request,) = started.submit("a")
    started.pool.terminate_job(started.process.pid, 15)
    assert not started.process.is_killed
    assert request.job is not None
    assert request.job.state is JobState.SENT


# The state file


def test_a_worker_with_a_free_place_is_ready_and_a_full_one_busy(started: Bench) -> None:
    started.until(lambda: started.state == "READY")
    started.submit(*map(str, range(THREADS)))
    started.until(lambda: started.state == "BUSY")
    started.process.finish("0")
    started.until(lambda: started.state == "READY")


def test_a_worker_is_unhealthy_from_its_process_death_until_the_next_is_ready(started: Bench) -> None:
    started.scripts = [loading]
    started.process.die()
    started.until(lambda: started.state == "UNHEALTHY")
    started.process.say(Ready())
    started.until(lambda: started.state == "READY")


def test_a_worker_is_unhealthy_long_before_its_silent_process_is_replaced(started: Bench) -> None:
    started.process.last_heartbeat -= 0.11 * HANG_S
    started.until(lambda: started.state == "UNHEALTHY")
    assert not started.process.is_killed
    started.process.say(Heartbeat({}, THREADS, THREADS, 0.0, 0.0))
    started.until(lambda: started.state == "READY")


def test_the_state_of_a_worker_whose_model_cannot_be_served_outlives_it(bench: Bench) -> None:
    bench.scripts = [broken]
    with pytest.raises(WorkerShutdown):
        bench.pool.start()
    assert bench.state == "SETUP_FAILED"


def test_a_worker_that_loads_is_starting_and_one_that_dies_loading_unhealthy(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def looked() -> None:
        said.append(bench.state)
        if len(said) == 20:
            raise WorkerShutdown(0)
        if len(said) == 10:
            bench.process.die()

    monkeypatch.setattr(worker_state, "maybe_shutdown", lambda: looked() if bench.processes else None)
    bench.scripts = [loading, loading]
    with pytest.raises(WorkerShutdown):
        bench.pool.start()
    assert said[:10] == ["STARTING"] * 10
    assert said[-1] == "UNHEALTHY"


def test_a_worker_that_ended_in_order_has_no_state(started: Bench) -> None:
    started.until(lambda: started.state == "READY")
    started.pool.terminate()
    assert not started.state_file.exists()
