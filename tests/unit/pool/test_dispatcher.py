"""Which jobs may run now."""

from __future__ import annotations

import itertools

import pytest

from tasks.protocol import RUN
from worker.pool.dispatcher import Dispatcher
from worker.pool.job import JobState, PoolJob, RequestCallbacks
from worker.pool.quarantine import ALONE, MAX_DEATHS_ALONE


@pytest.fixture
def dispatcher() -> Dispatcher:
    return Dispatcher()


_serials = itertools.count()


def job(id: str, body: bytes = b"[[], {}, {}]", retries: int = 0) -> PoolJob:
    arguments = ("idefics.caption", id, {"retries": retries}, body, "application/json", "utf-8")
    return PoolJob(next(_serials), arguments, RequestCallbacks(max, max, max), hard_limit=None, cancel=lambda job: None)


def held(dispatcher: Dispatcher, *ids: str) -> list[PoolJob]:
    """Jobs that wait."""
    jobs = [job(id) for id in ids]
    for each in jobs:
        dispatcher.add(each)
    return jobs


def send_next(dispatcher: Dispatcher) -> list[str]:
    """The ids of the jobs that may run now; from then on they do."""
    jobs = dispatcher.next_jobs()
    for each in jobs:
        each.state = JobState.SENT
    return [each.id for each in jobs]


# Without deaths


def test_all_that_wait_may_run_in_the_order_in_which_they_came(dispatcher: Dispatcher) -> None:
    held(dispatcher, "a", "b", "c")
    assert send_next(dispatcher) == ["a", "b", "c"]
    assert send_next(dispatcher) == []


def test_a_closed_dispatcher_lets_nothing_run(dispatcher: Dispatcher) -> None:
    held(dispatcher, "a")
    dispatcher.is_closed = True
    assert send_next(dispatcher) == []


def test_a_job_leaves_the_table_once(dispatcher: Dispatcher) -> None:
    (a,) = held(dispatcher, "a")
    assert dispatcher.remove(a)
    assert not dispatcher.remove(a)
    assert len(dispatcher) == 0
    assert dispatcher.with_id("a") == []


def test_jobs_under_one_id_run_one_after_the_other(dispatcher: Dispatcher) -> None:
    first, _, _ = held(dispatcher, "a", "a", "b")
    assert send_next(dispatcher) == ["a", "b"]
    assert send_next(dispatcher) == []
    dispatcher.remove(first)
    assert send_next(dispatcher) == ["a"]


def test_a_message_that_comes_again_stands_for_the_latest_job_of_its_content(dispatcher: Dispatcher) -> None:
    one, other = job("a", b'[[], {"image": "1"}, {}]'), job("a", b'[[], {"image": "2"}, {}]')
    dispatcher.add(one)
    assert dispatcher.same_as(job("a", b'[[], {"image":"1"}, {}]')) is one
    assert dispatcher.same_as(other) is None
    dispatcher.add(other)
    assert dispatcher.same_as(job("a", b'[[], {"image":"2"}, {}]')) is other
    # The later one is what its producer asked for last.
    assert dispatcher.same_as(job("a", b'[[], {"image":"1"}, {}]')) is None


def test_a_retry_is_another_job(dispatcher: Dispatcher) -> None:
    held(dispatcher, "a")
    assert dispatcher.same_as(job("a", retries=1)) is None


def test_a_job_that_a_worker_sent_again_is_another_one_even_if_the_first_run_has_not_ended(
    dispatcher: Dispatcher,
) -> None:
    held(dispatcher, "a")
    again = job("a")
    again.trace_arguments[2][RUN] = 1
    assert dispatcher.same_as(again) is None
    dispatcher.add(again)
    assert dispatcher.same_as(again) is again


def test_a_job_that_ended_while_others_were_sent_is_not_sent(dispatcher: Dispatcher) -> None:
    a, b = held(dispatcher, "a", "b")
    assert dispatcher.may_send(a)
    dispatcher.remove(a)
    b.state = JobState.SENT
    assert not dispatcher.may_send(a)
    assert not dispatcher.may_send(b)


# After a death of the model process


def died(dispatcher: Dispatcher) -> tuple[list[str], list[str]]:
    """The ids of those that do not run again: canceled and lost. They leave the table."""
    ended = dispatcher.after_death()
    for each in (*ended.canceled, *ended.lost):
        dispatcher.remove(each)
    return [each.id for each in ended.canceled], [each.id for each in ended.lost]


def test_few_jobs_in_flight_run_again_one_by_one_before_all_others(dispatcher: Dispatcher) -> None:
    a, b = held(dispatcher, "a", "b")
    send_next(dispatcher)
    held(dispatcher, "new")
    assert died(dispatcher) == ([], [])
    assert send_next(dispatcher) == ["a"]
    assert dispatcher.is_isolated
    assert send_next(dispatcher) == []
    dispatcher.remove(a)
    assert send_next(dispatcher) == ["b"]
    dispatcher.remove(b)
    assert send_next(dispatcher) == ["new"]
    assert not dispatcher.is_isolated


def test_many_jobs_in_flight_run_again_in_groups(dispatcher: Dispatcher) -> None:
    held(dispatcher, *map(str, range(ALONE**2)))
    send_next(dispatcher)
    died(dispatcher)
    assert len(send_next(dispatcher)) == ALONE


def test_jobs_that_run_again_are_marked_as_redelivered(dispatcher: Dispatcher) -> None:
    (a,) = held(dispatcher, "a")
    send_next(dispatcher)
    died(dispatcher)
    assert a.is_suspect
    assert a.trace_arguments[2]["delivery_info"] == {"redelivered": True}


def test_jobs_beside_a_known_culprit_run_again_together(dispatcher: Dispatcher) -> None:
    held(dispatcher, "a", "b")
    send_next(dispatcher)
    dispatcher.culprit_is_known = True
    died(dispatcher)
    assert send_next(dispatcher) == ["a", "b"]
    assert not dispatcher.is_isolated
    # Of the next death the culprit is unknown.
    died(dispatcher)
    assert send_next(dispatcher) == ["a"]


def test_a_canceled_job_does_not_run_again(dispatcher: Dispatcher) -> None:
    a, _ = held(dispatcher, "a", "b")
    send_next(dispatcher)
    a.canceled = True
    assert died(dispatcher) == (["a"], [])
    assert send_next(dispatcher) == ["b"]


def test_a_job_is_lost_after_deaths_with_it_alone_in_the_process(dispatcher: Dispatcher) -> None:
    held(dispatcher, "a")
    for deaths in range(1, MAX_DEATHS_ALONE + 1):
        assert send_next(dispatcher) == ["a"]
        assert died(dispatcher) == ([], ["a"] if deaths == MAX_DEATHS_ALONE else [])


def test_a_job_in_quarantine_waits_for_those_in_flight_and_runs_alone(dispatcher: Dispatcher) -> None:
    (a,) = held(dispatcher, "a")
    send_next(dispatcher)
    suspect, _ = held(dispatcher, "suspect", "b")
    dispatcher.quarantine(suspect)
    assert dispatcher.is_isolated
    assert send_next(dispatcher) == []
    dispatcher.remove(a)
    assert send_next(dispatcher) == ["suspect"]
    dispatcher.remove(suspect)
    assert send_next(dispatcher) == ["b"]


def test_jobs_in_quarantine_that_have_ended_are_passed_over(dispatcher: Dispatcher) -> None:
    a, _ = held(dispatcher, "a", "b")
    dispatcher.quarantine(a)
    dispatcher.remove(a)
    assert send_next(dispatcher) == ["b"]
