"""Jobs over their time limits, and model processes without heartbeats."""

from __future__ import annotations

import time

from tasks.errors import DeadlineExceeded
from tests.unit.pool.bench import HANG_S, LIMIT_S, SHORTLY, THREADS, Bench
from worker.pool import pool as pool_module
from worker.pool.wire import (
    Abandon,
    Heartbeat,
)


def test_a_job_over_its_hard_limit_fails_alone_and_its_neighbours_run_again_together(started: Bench) -> None:
    slow, *others = started.submit("slow", "b", "c", timeout=LIMIT_S)
    started.process.accept("b")
    started.process.accept("slow", at=time.monotonic() - LIMIT_S - 1)
    old = started.process
    started.until(lambda: "failure" in slow.kinds)
    assert isinstance(slow.error, DeadlineExceeded)
    assert old.is_killed
    started.until(lambda: started.process is not old and started.process.ran)
    # Together: nobody suspects them.
    assert started.process.ran == ["b", "c"]
    for id in ("b", "c"):
        started.process.finish(id)
    started.until(lambda: all("success" in request.kinds for request in others))
    assert slow.kinds == ["accepted", "failure"]
    assert started.semaphore.releases == 3


def test_a_job_over_a_limit_of_its_own_fails_alone_and_the_process_stays(started: Bench) -> None:
    slow, other = started.submit("slow", "b", timeout=30)
    process = started.process
    process.accept("slow", at=time.monotonic() - LIMIT_S + SHORTLY)
    started.until(lambda: "failure" in slow.kinds)
    assert isinstance(slow.error, DeadlineExceeded)
    assert Abandon(process.serial("slow")) in process.heard
    # What its thread says later is of no interest.
    for id in ("slow", "b"):
        process.finish(id)
    started.until(lambda: "success" in other.kinds)
    assert slow.kinds == ["accepted", "failure"]
    assert started.semaphore.releases == 2
    time.sleep(SHORTLY)
    started.settle()
    assert not process.is_killed


def test_a_timed_out_job_that_runs_on_past_the_workers_limit_has_the_process_replaced(started: Bench) -> None:
    started.submit("slow", "b", timeout=30)
    old = started.process
    old.accept("slow", at=time.monotonic() - LIMIT_S + SHORTLY)
    started.settle()
    assert not old.is_killed
    started.until(lambda: started.process is not old and started.process.ran)
    assert started.process.ran == ["b"]
    started.settle()
    assert not started.process.is_killed


def test_a_neighbour_of_overdue_jobs_is_never_lost(started: Bench) -> None:
    (neighbour,) = started.submit("neighbour")
    for n in range(4):
        old = started.process
        started.submit(f"slow {n}", timeout=LIMIT_S)
        old.accept(f"slow {n}", at=time.monotonic() - LIMIT_S - 1)
        started.until(lambda old=old: started.process is not old and "neighbour" in started.process.ran)
    assert neighbour.told == []


def test_a_limit_counts_from_the_start_and_not_from_the_queue(started: Bench) -> None:
    (request,) = started.submit("a", timeout=0.01)
    time.sleep(0.03)
    started.settle()
    assert request.told == []


def test_a_job_without_a_limit_never_times_out(started: Bench) -> None:
    (request,) = started.submit("a")
    started.process.accept("a", at=time.monotonic() - 1e6)
    started.settle()
    assert request.kinds == ["accepted"]


def test_a_process_without_heartbeats_is_replaced_and_its_job_runs_again(started: Bench) -> None:
    started.submit("a")
    old = started.process
    old.last_heartbeat -= HANG_S + 1
    started.until(lambda: started.process is not old and started.process.ran)
    assert old.is_killed
    assert started.process.ran == ["a"]


def test_a_heartbeat_keeps_the_process_alive(started: Bench) -> None:
    process = started.process
    process.last_heartbeat -= HANG_S - 0.01
    process.say(Heartbeat({}, THREADS, THREADS, 0.0, 0.0))
    started.settle()
    assert not process.is_killed


def test_a_pool_that_was_blocked_handles_ends_of_jobs_before_their_time_limits(started: Bench) -> None:
    (request,) = started.submit("a", timeout=30)
    started.process.accept("a", at=time.monotonic() - 20)
    started.until(lambda: request.told)
    assert request.job is not None
    request.job.accepted_at = time.monotonic() - 31
    started.process.finish("a")
    time.sleep(2 * pool_module.TICK_S)
    started.hub.fire_timers()
    assert request.kinds == ["accepted", "success"]
    assert not started.process.is_killed


def test_messages_of_job_threads_do_not_count_as_heartbeats(started: Bench) -> None:
    started.submit("a")
    old = started.process
    old.last_heartbeat -= HANG_S - 0.05

    def killed_although_it_says_something() -> bool:
        old.accept("a")
        return old.is_killed

    started.until(killed_although_it_says_something)
