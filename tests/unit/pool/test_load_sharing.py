"""What a pool says of its load, and the jobs that it leaves to other workers."""

from __future__ import annotations

import pytest
from billiard.exceptions import Terminated

from config.settings import Settings
from tests.unit.pool.bench import HANG_S, THREADS, Bench, loading
from worker.pool import load_sharing
from worker.pool.wire import (
    GiveBack,
    Heartbeat,
    Ready,
    Returned,
    Withdrawn,
)
from worker.queue.load_estimates import LONGEST_S, Load
from worker.queue.redeliveries import History

# Whether it wants jobs


def test_a_pool_wants_no_jobs_until_its_next_process_is_ready(started: Bench) -> None:
    started.until(lambda: started.pool.can_accept_jobs)
    started.scripts.append(loading)
    started.process.die()
    started.until(lambda: len(started.processes) == 2)
    assert not started.pool.can_accept_jobs
    started.process.say(Ready())
    started.until(lambda: started.pool.can_accept_jobs)


def test_a_pool_wants_no_jobs_while_suspects_run(started: Bench) -> None:
    started.submit("a", "b")
    started.die_and_restart()
    for ran in (["a"], ["a", "b"]):
        started.until(lambda ran=ran: started.process.ran == ran)
        assert not started.pool.can_accept_jobs
        started.process.finish(ran[-1])
    started.until(lambda: started.pool.can_accept_jobs)


def test_a_pool_wants_no_jobs_while_its_process_is_silent(started: Bench) -> None:
    started.process.last_heartbeat -= 0.11 * HANG_S
    assert not started.pool.can_accept_jobs
    started.process.say(Heartbeat({}, THREADS, THREADS, 0.0, 0.0))
    started.until(lambda: started.pool.can_accept_jobs)


# Jobs that go back for other workers


@pytest.fixture
def hoarding(started: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Jobs may go back at once."""
    monkeypatch.setattr(load_sharing, "KEPT_S", -1.0)
    return started


def asked(bench: Bench) -> list[GiveBack]:
    return [message for message in bench.process.heard if isinstance(message, GiveBack)]


def test_a_pool_tells_its_load(started: Bench) -> None:
    slots = Settings().max_batch_size
    started.submit("a", "b")
    assert started.pool.load.unbegun == 2 - slots
    started.process.say(Heartbeat({}, 1, 1.0, 2.5, 2.0))
    started.until(lambda: started.pool.load == Load(1.0, 2.5, 1, closed_s=2.0))


def test_a_pool_whose_model_loads_reports_that_it_is_closed(started: Bench) -> None:
    started.scripts.append(loading)
    started.process.die()
    started.until(lambda: len(started.processes) == 2)
    started.submit("a")
    assert not started.pool.load.is_open
    assert started.pool.load.ends_in_s() >= LONGEST_S
    assert started.pool.load.unbegun == 1


def test_a_full_pool_whose_places_wait_for_images_takes_nothing(started: Bench) -> None:
    started.submit(*map(str, range(THREADS)))
    started.process.say(Heartbeat({}, 2 * THREADS, 1.0, 1.0, 0.0))
    started.until(lambda: not started.pool.load.is_open)


def test_a_pool_that_leaves_jobs_to_others_wants_none(started: Bench) -> None:
    started.until(lambda: started.pool.can_accept_jobs)
    started.pool.leaves_to_others = True
    assert not started.pool.can_accept_jobs


def test_jobs_that_have_not_begun_go_back_together_the_latest_first(hoarding: Bench) -> None:
    requests = hoarding.submit("a", "b", "c", queue="idefics")
    serials = [hoarding.process.serial(id) for id in "abc"]
    hoarding.pool.give_back("idefics", 2)
    assert asked(hoarding) == [GiveBack(2, serials)]
    hoarding.process.say(Withdrawn(serials[1:]))
    hoarding.process.say(Returned(serials[1]))
    hoarding.settle()
    assert not any(request.told for request in requests)
    hoarding.process.say(Returned(serials[2]))
    hoarding.until(lambda: requests[1].told and requests[2].told)
    assert requests[2].told[0][1] < requests[1].told[0][1]
    assert hoarding.semaphore.releases == 2
    hoarding.process.finish("a")
    hoarding.until(lambda: requests[0].told)
    assert requests[0].kinds == ["success"]


def test_jobs_that_return_wait_only_briefly_for_the_others(hoarding: Bench) -> None:
    a, b = hoarding.submit("a", "b", queue="idefics")
    hoarding.process.say(Withdrawn([hoarding.process.serial(id) for id in "ab"]))
    hoarding.process.say(Returned(hoarding.process.serial("a")))
    hoarding.until(lambda: a.told)
    hoarding.process.say(Returned(hoarding.process.serial("b")))
    hoarding.until(lambda: b.told)
    assert (a.kinds, b.kinds) == (["given back"], ["given back"])


def test_jobs_of_another_queue_and_jobs_that_have_just_come_stay(started: Bench) -> None:
    started.submit("a", queue="other")
    started.submit("b", queue="idefics")
    started.pool.give_back("idefics", 9)
    assert asked(started) == []


def test_a_job_that_is_canceled_on_its_way_back_is_revoked(hoarding: Bench) -> None:
    (request,) = hoarding.submit("a", queue="idefics")
    hoarding.process.say(Withdrawn([hoarding.process.serial("a")]))
    request.job.terminate()
    hoarding.process.say(Returned(hoarding.process.serial("a")))
    hoarding.until(lambda: request.told)
    assert isinstance(request.error, Terminated)


def test_jobs_that_wait_for_a_new_process_go_back_and_its_suspects_stay(hoarding: Bench) -> None:
    (suspect,) = hoarding.submit("suspect", queue="idefics")
    hoarding.scripts.append(loading)
    hoarding.process.die()
    hoarding.until(lambda: len(hoarding.processes) == 2)
    (innocent,) = hoarding.submit("innocent", queue="idefics")
    hoarding.pool.give_back("idefics", 9)
    assert innocent.kinds == ["given back"]
    assert suspect.told == []
    hoarding.process.say(Ready())
    hoarding.until(lambda: hoarding.process.ran == ["suspect"])


def test_a_death_while_jobs_return_loses_none(hoarding: Bench) -> None:
    hoarding.submit("a", "b", queue="idefics")
    hoarding.process.say(Withdrawn([hoarding.process.serial(id) for id in "ab"]))
    hoarding.process.say(Returned(hoarding.process.serial("a")))
    hoarding.settle()
    hoarding.die_and_restart()
    hoarding.until(lambda: hoarding.process.ran)
    hoarding.process.finish("a")
    hoarding.until(lambda: hoarding.process.ran == ["a", "b"])


def test_the_start_of_a_job_that_goes_back_is_unmarked(hoarding: Bench) -> None:
    hoarding.ledger.histories["a", 0] = History(1, 1)
    hoarding.submit("a", queue="idefics", redelivered=True)
    assert hoarding.ledger.counts == {("a", 0): 1}
    hoarding.process.say(Withdrawn([hoarding.process.serial("a")]))
    hoarding.process.say(Returned(hoarding.process.serial("a")))
    hoarding.until(lambda: hoarding.semaphore.releases == 1)
    assert hoarding.ledger.counts == {("a", 0): 0}
