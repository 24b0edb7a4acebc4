"""A job's way through the pool: what is sent for it, and what Celery is told."""

from __future__ import annotations

from typing import Any

import pytest
from billiard.exceptions import Terminated
from celery.exceptions import Reject
from celery.worker import state as worker_state
from redis.exceptions import ResponseError

from tasks.errors import Internal, WorkerLost
from tasks.protocol import SUBMITTED_AT
from tests.unit.pool.bench import THREADS, Bench, loading
from worker.pool import lifecycle
from worker.pool.job import PoolJob, RequestCallbacks
from worker.pool.wire import (
    Away,
    Broken,
    Cancel,
    Canceled,
    Done,
    Raised,
    Ready,
)
from worker.queue.redeliveries import History
from worker.runtime.exception_info import exception_info

# Sent, accepted, done


def test_the_pool_lets_in_as_many_jobs_as_it_has_threads(started: Bench) -> None:
    assert started.semaphore.initial_value == THREADS


def test_a_job_is_sent_accepted_and_done(started: Bench) -> None:
    (request,) = started.submit("a")
    assert started.process.ran == ["a"]
    started.process.accept("a", at=12.5)
    started.process.finish("a")
    started.until(lambda: len(request.told) == 2)
    assert request.told == [("accepted", started.process.pid, 12.5), ("success", "answer of a")]
    assert started.semaphore.releases == 1


def test_many_jobs_are_in_flight_at_once_and_end_in_any_order(started: Bench) -> None:
    requests = started.submit("a", "b", "c")
    assert started.process.ran == ["a", "b", "c"]
    for id in ("c", "a", "b"):
        started.process.finish(id)
    started.until(lambda: all(request.told for request in requests))
    assert [request.told for request in requests] == [[("success", f"answer of {id}")] for id in "abc"]
    assert started.semaphore.releases == 3


def test_a_job_is_sent_without_its_payloads_second_copy(started: Bench) -> None:
    started.submit("a")
    (message,) = started.process.heard
    name, id, request, body, kind, encoding = message.arguments
    assert (name, id, kind, encoding) == ("idefics.caption", "a", "application/json", "utf-8")
    assert body == b"[[], {}, {}]"
    assert set(request) == {"id", "retries", SUBMITTED_AT}


def test_a_rejection_is_reported_as_a_failure(started: Bench) -> None:
    (request,) = started.submit("a")
    started.process.say(Raised(started.process.serial("a"), exception_info(ValueError("boom"))))
    started.until(lambda: request.told)
    assert isinstance(request.error, ValueError)
    assert started.semaphore.releases == 1


def test_an_outcome_that_comes_twice_counts_once(started: Bench) -> None:
    (request,) = started.submit("a")
    started.process.finish("a")
    started.process.finish("a")
    started.process.say(Done(999, (0, "nobody's", 0.1)))
    started.until(lambda: request.told)
    started.settle()
    assert request.kinds == ["success"]
    assert started.semaphore.releases == 1


def test_a_callback_that_fails_frees_its_place_and_the_pool_goes_on(started: Bench) -> None:
    (bad,) = started.submit("bad")
    bad.job.callbacks.success = None  # type: ignore[union-attr,assignment]
    (good,) = started.submit("good")
    started.process.finish("bad")
    started.process.finish("good")
    started.until(lambda: good.told)
    assert started.semaphore.releases == 2


def test_an_outcome_that_cannot_be_stored_sends_its_job_back_to_the_queue(started: Bench) -> None:
    (request,) = started.submit("a")

    def on_success(outcome: tuple[Any, ...]) -> None:
        raise ConnectionError("the results' server is away")

    assert request.job is not None
    request.job.callbacks.success = on_success
    started.process.accept("a")
    started.process.finish("a")
    started.until(lambda: request.told[-1:] and request.kinds[-1] == "failure")
    assert isinstance(request.error, Reject)
    assert request.error.requeue is True
    assert started.semaphore.releases == 1


def test_a_job_whose_redis_stayed_away_goes_back_to_the_queue_and_its_start_is_unmarked(started: Bench) -> None:
    started.ledger.histories["a", 0] = History(1, 1)
    (request,) = started.submit("a")
    started.process.accept("a")
    started.process.say(Away(started.process.serial("a")))
    started.until(lambda: "failure" in request.kinds)
    assert isinstance(request.error, Reject)
    assert request.error.requeue is True
    assert not started.ledger.counts["a", 0]


def test_waiting_for_redis_does_not_count_towards_the_time_limit() -> None:
    job = PoolJob(0, ("name", "id", {}), RequestCallbacks(max, max, max), hard_limit=2.0, cancel=lambda job: None)
    job.accept(1, at=100.0)
    job.waited_s = 5.0
    assert not job.is_overdue(now=106.9)
    assert job.is_overdue(now=107.1)


def test_an_outcome_that_a_defect_keeps_from_being_stored_is_dropped_after_a_few_deliveries(
    started: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    started.ledger.histories["a", 0] = History(2, 2)
    (request,) = started.submit("a", redelivered=True)
    started.process.accept("a")

    def on_success(outcome: tuple[Any, ...]) -> None:
        raise ResponseError("WRONGTYPE Operation against a key")

    assert request.job is not None
    request.job.callbacks.success = on_success
    started.process.finish("a")
    started.until(lambda: request.told[-1:] and request.kinds[-1] == "failure")
    assert isinstance(request.error, Reject)
    assert request.error.requeue is False
    assert "is dropped" in caplog.text


def test_a_job_that_its_task_rejects_again_and_again_fails(started: Bench) -> None:
    for deaths, ends in ((0, False), (1, False), (2, True)):
        started.ledger.histories["a", 0] = History(deaths, deaths)
        (request,) = started.submit("a", redelivered=deaths > 0)
        started.process.accept("a")
        info = exception_info(Reject("its links cannot be sent", requeue=True))
        started.process.say(Raised(started.process.serial("a"), info))
        started.until(lambda told=request.told: told[-1:] and told[-1][0] == "failure")
        assert isinstance(request.error, Internal if ends else Reject)


def test_a_defect_outside_of_celerys_tracer_is_an_internal_failure(started: Bench) -> None:
    (request,) = started.submit("a")
    started.process.accept("a")
    started.process.say(Broken(started.process.serial("a"), "SystemExit in the worker."))
    started.until(lambda: "failure" in request.kinds)
    assert isinstance(request.error, Internal)
    assert str(request.error) == "SystemExit in the worker."


def test_a_defect_in_a_cold_shutdown_sends_its_job_back(started: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_state, "should_terminate", True)
    (request,) = started.submit("a")
    started.process.accept("a")
    started.process.say(Broken(started.process.serial("a"), "SystemExit in the worker."))
    started.until(lambda: "failure" in request.kinds)
    assert isinstance(request.error, Reject)
    assert request.error.requeue


def test_the_next_in_celerys_semaphore_takes_a_free_place(started: Bench) -> None:
    started.submit(*[f"job {n}" for n in range(THREADS)])
    started.submit("next")
    assert "next" not in started.process.ran
    started.process.finish("job 5")
    started.until(lambda: "next" in started.process.ran)


# Adoption


def test_a_message_delivered_again_while_its_job_runs_is_answered_by_the_same_run(started: Bench) -> None:
    (first,) = started.submit("a")
    started.process.accept("a", at=12.5)
    started.until(lambda: first.told)
    (again,) = started.submit("a")
    assert again.job is first.job
    assert started.process.ran == ["a"]
    assert again.told == [("accepted", started.process.pid, 12.5)]
    assert started.semaphore.releases == 1
    started.process.finish("a")
    started.until(lambda: len(again.told) == 2)
    assert again.kinds == ["accepted", "success"]
    assert first.kinds == ["accepted"]
    assert started.semaphore.releases == 2


def test_a_message_delivered_again_before_its_job_started_is_accepted_when_it_does(started: Bench) -> None:
    started.submit("a")
    (again,) = started.submit("a")
    assert again.told == []
    started.process.accept("a")
    started.until(lambda: again.told)
    assert again.kinds == ["accepted"]


def test_a_retry_is_a_job_of_its_own(started: Bench) -> None:
    (first,) = started.submit("a")
    (retry,) = started.submit("a", retries=1)
    assert retry.job is not first.job
    started.process.finish("a")
    started.until(lambda: started.process.ran == ["a", "a"])


ONE, OTHER = b'[[], {"image": "1"}, {}]', b'[[], {"image": "2"}, {}]'


def test_another_job_under_the_id_of_one_that_runs_runs_after_it(started: Bench) -> None:
    (first,), (second,) = started.submit("a", body=ONE), started.submit("a", body=OTHER)
    started.submit("b")
    assert started.process.ran == ["a", "b"]
    started.process.finish("a")
    started.until(lambda: started.process.ran == ["a", "b", "a"])
    assert (first.kinds, second.kinds) == (["success"], [])
    started.process.finish("a")
    started.until(lambda: second.told)
    assert second.kinds == ["success"]
    assert started.semaphore.releases == 2


def test_a_job_that_is_sent_again_after_another_one_under_its_id_runs_again(started: Bench) -> None:
    requests = [started.submit("a", body=body)[0] for body in (ONE, OTHER, ONE)]
    for count in (1, 2, 3):
        started.until(lambda count=count: len(started.process.ran) == count)
        started.process.finish("a")
    started.until(lambda: all(request.told for request in requests))
    assert [request.kinds for request in requests] == [["success"]] * 3


def test_a_job_whose_payload_is_serialized_differently_is_the_same_job(started: Bench) -> None:
    (first,) = started.submit("a", body=b'[[], {"image": "1", "seed": null}, {}]')
    (again,) = started.submit("a", body=b'[[], {"seed":null,"image":"1"}, {"chain": null}]')
    assert again.job is first.job


def test_a_job_runs_once_another_one_under_its_id_has_timed_out(started: Bench) -> None:
    started.submit("a", body=ONE, timeout=0.05)
    started.submit("a", body=OTHER)
    started.process.accept("a")
    started.until(lambda: started.process.ran == ["a", "a"])


# Cancelling


def test_a_running_job_is_canceled_in_its_process(started: Bench) -> None:
    canceled, other = started.submit("a", "b")
    started.process.accept("a")
    started.until(lambda: canceled.told)
    canceled.job.terminate()  # type: ignore[union-attr]
    assert started.process.heard[-1] == Cancel(started.process.serial("a"))
    assert canceled.kinds == ["accepted"]
    started.process.say(Canceled(started.process.serial("a"), {"text": "so far"}))
    started.until(lambda: len(canceled.told) == 2)
    assert isinstance(canceled.error, Terminated)
    assert canceled.job.partial == {"text": "so far"}  # type: ignore[union-attr]
    assert other.told == []
    assert started.semaphore.releases == 1


def test_a_job_that_waits_for_a_process_is_canceled_at_once_and_never_sent(started: Bench) -> None:
    started.scripts = [loading]
    (request,) = started.submit("a")
    started.process.die()
    started.until(lambda: len(started.processes) == 2)
    request.job.terminate()  # type: ignore[union-attr]
    assert isinstance(request.error, Terminated)
    assert started.semaphore.releases == 1
    started.process.say(Ready())
    started.settle()
    assert started.process.ran == []


def test_a_job_that_was_done_before_its_cancellation_arrived_is_done(started: Bench) -> None:
    (request,) = started.submit("a")
    request.job.terminate()  # type: ignore[union-attr]
    started.process.finish("a")
    started.until(lambda: request.told)
    assert request.kinds == ["success"]
    assert started.semaphore.releases == 1


def test_a_canceled_job_does_not_run_again_after_a_death(started: Bench) -> None:
    canceled, other = started.submit("a", "b")
    canceled.job.terminate()  # type: ignore[union-attr]
    started.die_and_restart()
    assert isinstance(canceled.error, Terminated)
    assert started.process.ran == ["b"]
    started.process.finish("b")
    started.until(lambda: other.told)
    assert started.semaphore.releases == 2


# Redeliveries


def test_a_job_that_is_delivered_once_is_not_counted(started: Bench) -> None:
    started.submit("a")
    started.process.finish("a")
    assert not started.ledger.counts


def test_a_job_that_only_claims_to_be_redelivered_is_not_counted(started: Bench) -> None:
    started.submit("first")
    started.submit("forged", redelivered=True)
    assert started.process.ran == ["first", "forged"]
    assert not started.ledger.counts


def test_the_start_of_a_job_that_came_back_is_marked(started: Bench) -> None:
    started.ledger.histories["bad", 0] = History(1, 1)
    (suspect,) = started.submit("bad", redelivered=True)
    assert started.ledger.counts == {("bad", 0): 1}
    started.process.finish("bad")
    started.until(lambda: suspect.told)
    assert suspect.kinds == ["success"]


def test_a_job_that_came_back_and_waits_for_the_model_is_not_marked(bench: Bench) -> None:
    bench.ledger.histories["waits", 0] = History(1, 1)
    bench.start()
    bench.scripts.append(loading)
    bench.process.die()
    bench.until(lambda: len(bench.processes) == 2)
    bench.submit("waits", redelivered=True)
    assert not bench.ledger.counts
    bench.process.say(Ready())
    bench.until(lambda: bench.process.ran)
    assert bench.ledger.counts == {("waits", 0): 1}


def test_deaths_of_the_model_process_alone_are_not_counted(started: Bench) -> None:
    started.ledger.histories |= {(id, 0): History(1, 1) for id in "abc"}
    requests = started.submit("a", "b", "c", redelivered=True)
    for _ in range(2):
        started.die_and_restart()
        started.until(lambda: started.process.ran)
    assert set(started.ledger.counts.values()) == {1}
    assert not any(request.kinds == ["failure"] for request in requests[1:])


def test_a_message_that_comes_again_while_its_job_runs_is_not_counted(started: Bench) -> None:
    started.submit("a")
    started.submit("a", redelivered=True)
    assert not started.ledger.counts


def test_a_job_that_was_there_at_two_deaths_runs_alone(started: Bench) -> None:
    started.ledger.histories["bad", 0] = History(2, 2)
    started.submit("first")
    started.submit("bad", redelivered=True)
    started.submit("last")
    assert started.process.ran == ["first"]
    started.process.finish("first")
    started.until(lambda: started.process.ran == ["first", "bad"])
    started.process.finish("bad")
    started.until(lambda: started.process.ran == ["first", "bad", "last"])


def test_a_job_that_was_there_at_three_deaths_fails_and_frees_its_place(started: Bench) -> None:
    started.ledger.histories["bad", 0] = History(3, 3)
    (bad,) = started.submit("bad", redelivered=True)
    assert isinstance(bad.error, WorkerLost)
    assert str(bad.error).startswith("3 workers died with this job")
    assert started.process.ran == []
    assert started.semaphore.releases == 1


def test_another_attempt_of_a_job_is_counted_for_itself(started: Bench) -> None:
    started.ledger.histories["bad", 0] = History(3, 3)
    started.submit("bad", redelivered=True, retries=1)
    assert started.process.ran == ["bad"]


def test_the_starts_of_jobs_that_a_stopping_worker_gives_back_are_unmarked(started: Bench) -> None:
    started.ledger.histories["old", 0] = History(1, 1)
    started.submit("new")
    started.submit("old", redelivered=True)
    for _ in range(2):
        started.pool.terminate()
        assert started.ledger.counts == {("old", 0): 0}


# Defects of ours


def test_a_job_that_cannot_be_sent_fails_alone_and_frees_its_place(
    started: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sendable(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if arguments[1] == "deep":
            raise RecursionError
        return arguments

    monkeypatch.setattr(lifecycle, "sendable", sendable)
    deep, good = started.submit("deep", "good")
    assert isinstance(deep.error, Internal)
    assert started.process.ran == ["good"]
    assert started.semaphore.releases == 1
    started.process.finish("good")
    started.until(lambda: good.kinds == ["success"])
    assert started.semaphore.releases == 2


def test_a_waiting_job_that_cannot_be_sent_does_not_affect_the_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sendable(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if arguments[1].startswith("deep"):
            raise MemoryError
        return arguments

    monkeypatch.setattr(lifecycle, "sendable", sendable)
    bench.start()
    bench.scripts.append(loading)
    bench.process.die()
    bench.until(lambda: len(bench.processes) == 2)
    requests = bench.submit("a", "deep-1", "b", "deep-2", "c")
    bench.process.say(Ready())
    bench.until(lambda: len(bench.process.ran) == 3)
    assert bench.process.ran == ["a", "b", "c"]
    assert [request.kinds for request in requests] == [[], ["failure"], [], ["failure"], []]
