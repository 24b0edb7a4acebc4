"""Deaths of the model process: which jobs run again, beside whom, and which are lost."""

from __future__ import annotations

from tasks.errors import WorkerLost
from tests.unit.pool.bench import Bench, Request


def test_a_job_whose_process_died_runs_again_and_is_accepted_once(started: Bench) -> None:
    (request,) = started.submit("a")
    started.process.accept("a")
    started.until(lambda: request.told)
    started.die_and_restart()
    assert started.process.ran == ["a"]
    started.process.accept("a")
    started.process.finish("a")
    started.until(lambda: "success" in request.kinds)
    assert request.kinds == ["accepted", "success"]
    assert started.semaphore.releases == 1


def test_a_job_that_runs_again_is_marked_as_redelivered(started: Bench) -> None:
    started.submit("a")
    started.die_and_restart()
    started.until(lambda: started.process.ran)
    assert started.process.heard[0].arguments[2]["delivery_info"] == {"redelivered": True}


def test_messages_sent_before_a_death_count(started: Bench) -> None:
    (request,) = started.submit("a")
    started.process.finish("a")
    started.die_and_restart()
    assert request.kinds == ["success"]
    assert started.process.ran == []


def test_a_process_that_dies_idle_is_replaced(started: Bench) -> None:
    started.die_and_restart()
    (request,) = started.submit("a")
    started.process.finish("a")
    started.until(lambda: request.told)
    assert request.kinds == ["success"]


def test_suspects_run_one_by_one_and_new_jobs_wait(started: Bench) -> None:
    started.submit("a", "b", "c")
    started.die_and_restart()
    started.submit("new")
    assert started.process.ran == ["a"]
    for done, after in [("a", ["a", "b"]), ("b", ["a", "b", "c"]), ("c", ["a", "b", "c", "new"])]:
        started.process.finish(done)
        started.until(lambda after=after: started.process.ran == after)


def test_a_job_that_kills_its_process_twice_alone_is_lost(started: Bench) -> None:
    (request,) = started.submit("a")
    started.die_and_restart()
    assert request.told == []
    started.die_and_restart()
    assert isinstance(request.error, WorkerLost)
    assert request.kinds == ["failure"]
    assert started.semaphore.releases == 1
    assert started.process.ran == []


def test_a_job_that_kills_its_process_is_found_and_its_neighbours_succeed(started: Bench) -> None:
    requests = started.submit("a", "poison", "b")
    play(started, requests, {"poison"})
    assert [request.kinds[-1] for request in requests] == ["success", "failure", "success"]
    assert isinstance(requests[1].error, WorkerLost)
    assert len(started.processes) - 1 == 3
    assert started.semaphore.releases == 3


def test_one_poisonous_job_of_64_costs_few_deaths_and_no_other_job(started: Bench) -> None:
    ids = [f"job {n}" for n in range(63)]
    requests = started.submit(*ids[:40], "poison", *ids[40:])
    play(started, requests, {"poison"})
    failed = [request.id for request in requests if request.kinds[-1] == "failure"]
    assert failed == ["poison"]
    assert len(started.processes) - 1 <= 6
    assert all(request.kinds.count("success") == 1 for request in requests if request.id != "poison")
    assert started.semaphore.releases == 64


def play(bench: Bench, requests: list[Request], poison: set[str]) -> None:
    """Run all jobs; a process with a poisonous one dies before it finishes any."""
    finished: set[tuple[int, str]] = set()

    def act() -> bool:
        process = bench.process
        new = [id for id in process.ran if (process.pid, id) not in finished]
        if process.is_ready and poison & set(new):
            process.die()
        elif process.is_ready:
            for id in new:
                process.finish(id)
        finished.update((process.pid, id) for id in new)
        return all("success" in request.kinds or "failure" in request.kinds for request in requests)

    bench.until(act)
    # The last death's successor.
    bench.until(lambda: bench.process.is_ready)
