"""Jobs that wait for an image's host in the parent process: without a place, not forgotten, and returned."""

from __future__ import annotations

import time

import pytest

from tests.unit.pool.bench import Bench
from worker.pool import load_sharing
from worker.pool.wire import Parked, Resume

HOST = "slow.test"


def park(bench: Bench, *ids: str, host: str = HOST) -> None:
    for id in ids:
        bench.process.say(Parked(bench.process.serial(id), host))


def resume(bench: Bench, most: int, host: str = HOST) -> None:
    bench.process.say(Resume(host, most))


@pytest.fixture
def parked(started: Bench) -> Bench:
    """Jobs a, b and c are parked."""
    started.submit("a", "b", "c", queue="idefics")
    started.until(lambda: len(started.process.ran) == 3)
    park(started, "a", "b", "c")
    started.until(lambda: len(started.pool.parking) == 3)
    return started


def test_a_parked_job_gives_its_place_to_another_and_returns_when_its_host_has_room(parked: Bench) -> None:
    assert parked.semaphore.releases == 3
    resume(parked, 2, host="other.test")
    resume(parked, 2)
    parked.until(lambda: parked.process.ran == ["a", "b", "c", "a", "b"])
    assert len(parked.pool.parking) == 1
    parked.process.finish("a")
    parked.until(lambda: parked.semaphore.releases == 4)


def test_a_job_that_returns_waits_for_a_place_and_gets_the_next_one_before_new_jobs(parked: Bench) -> None:
    taken = [f"other-{number}" for number in range(parked.semaphore.value)]
    parked.submit(*taken, "new")
    resume(parked, 1)
    parked.settle()
    parked.process.finish(taken[0])
    parked.until(lambda: parked.process.ran[-1] == "a")
    assert "new" not in parked.process.ran
    parked.process.finish(taken[1])
    parked.until(lambda: parked.process.ran[-1] == "new")


def test_a_canceled_job_ends_while_it_is_parked_and_frees_no_place(parked: Bench) -> None:
    (request,) = parked.submit("d")
    parked.until(lambda: parked.process.ran[-1] == "d")
    park(parked, "d")
    parked.until(lambda: len(parked.pool.parking) == 4)
    releases = parked.semaphore.releases
    assert request.job is not None
    request.job.terminate()
    assert request.kinds == ["failure"]
    assert (len(parked.pool.parking), parked.semaphore.releases) == (3, releases)
    resume(parked, 4)
    parked.until(lambda: parked.process.ran[4:] == ["a", "b", "c"])


def test_a_job_that_is_canceled_while_it_waits_for_a_place_leaves_the_place_to_others(parked: Bench) -> None:
    (canceled,) = parked.submit("d")
    parked.until(lambda: parked.process.ran[-1] == "d")
    park(parked, "d", host="other.test")
    parked.until(lambda: len(parked.pool.parking) == 4)
    taken = [f"other-{number}" for number in range(parked.semaphore.value)]
    parked.submit(*taken, "new")
    resume(parked, 1, host="other.test")
    parked.settle()
    assert canceled.job is not None
    canceled.job.terminate()
    assert len(parked.pool.parking) == 3
    parked.process.finish(taken[0])
    parked.until(lambda: parked.process.ran[-1] == "new")


def test_parked_jobs_run_again_after_a_death_and_are_no_suspects(parked: Bench) -> None:
    parked.submit("killer")
    parked.until(lambda: parked.process.ran[-1] == "killer")
    parked.die_and_restart()
    parked.until(lambda: parked.process.ran == ["killer"])
    parked.process.finish("killer")
    parked.until(lambda: parked.process.ran == ["killer", "a", "b", "c"])
    assert len(parked.pool.parking) == 0


def test_parked_jobs_stay_unacknowledged_at_the_shutdown(parked: Bench) -> None:
    requests = parked.submit("d")
    parked.until(lambda: parked.process.ran[-1] == "d")
    parked.pool.on_close()
    park(parked, "d")
    parked.pool.on_stop()
    assert requests[0].kinds == []


def test_a_share_of_the_parked_jobs_returns_for_idle_workers_once(
    parked: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_sharing, "KEPT_S", 0.0)
    parked.until(lambda: parked.pool.can_accept_jobs)
    assert parked.pool.load.has_parked
    assert parked.pool.load.unbegun < 0
    parked.pool.sharing.share_parked("other", 1)
    assert len(parked.pool.parking) == 3
    parked.pool.sharing.share_parked("idefics", 2)
    parked.pool.sharing.share_parked("idefics", 2)
    assert len(parked.pool.parking) == 1
    # It must not take them itself.
    assert not parked.pool.can_accept_jobs
    resume(parked, 3)
    parked.until(lambda: parked.process.ran[3:] == ["a"])


def test_a_parked_job_is_given_back_no_other_way(parked: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_sharing, "KEPT_S", 0.0)
    parked.pool.give_back("idefics", 3)
    parked.settle()
    assert len(parked.pool.parking) == 3


def test_the_most_urgent_of_the_parked_jobs_returns_first(started: Bench) -> None:
    requests = started.submit("a", "b")
    started.until(lambda: len(started.process.ran) == 2)
    for request, priority in zip(requests, (9, 0), strict=True):
        assert request.job is not None
        request.job.trace_arguments[2]["delivery_info"] = {"priority": priority}
    park(started, "a", "b")
    started.until(lambda: len(started.pool.parking) == 2)
    resume(started, 1)
    started.until(lambda: started.process.ran[2:] == ["b"])


def test_the_end_of_a_job_that_was_timed_out_is_not_parked(started: Bench) -> None:
    (request,) = started.submit("a", timeout=0.01)
    started.until(lambda: started.process.ran == ["a"])
    started.process.accept("a", time.monotonic() - 1)
    started.until(lambda: request.kinds == ["accepted", "failure"])
    park(started, "a")
    started.settle()
    assert len(started.pool.parking) == 0
    assert request.kinds == ["accepted", "failure"]
