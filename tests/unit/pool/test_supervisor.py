"""The model process's life with a scripted one, by the clock of the test."""

from __future__ import annotations

import time

import pytest

from config.settings import Settings
from tests.unit.pool.bench import StubProcess
from worker.health import WorkerState
from worker.pool.supervisor import RESTART_DELAYS, RestartSchedule, Supervisor
from worker.pool.wire import Done, Heartbeat, JobMessage, Ready

HANG_S = Settings().hang_timeout_s


class Heard:
    """What the supervisor's listener was told."""

    def __init__(self) -> None:
        self.starts = 0
        self.messages: list[Heartbeat | JobMessage] = []
        self.ends: list[int] = []

    def process_started(self) -> None:
        self.starts += 1

    def heard(self, message: Heartbeat | JobMessage) -> None:
        self.messages.append(message)

    def process_ended(self, status: int) -> None:
        self.ends.append(status)


@pytest.fixture
def process() -> StubProcess:
    return StubProcess(pid=1000)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def supervisor(process: StubProcess, heard: Heard) -> Supervisor:
    supervisor = Supervisor(Settings(), "worker@here", lambda why: None, lambda hostname: process)
    supervisor.listen(heard)
    supervisor.maintain(time.monotonic())
    process.say(Ready())
    supervisor.receive()
    return supervisor


def test_a_process_is_ready_once_it_says_so(supervisor: Supervisor, heard: Heard) -> None:
    assert supervisor.is_ready
    assert supervisor.pid == 1000
    assert heard.starts == 1


def test_messages_about_jobs_are_passed_on_in_order(supervisor: Supervisor, process: StubProcess, heard: Heard) -> None:
    for serial in range(3):
        process.say(Done(serial, ()))
    supervisor.receive()
    assert heard.messages == [Done(0, ()), Done(1, ()), Done(2, ())]


def test_a_process_without_heartbeats_is_unhealthy_and_then_killed(
    supervisor: Supervisor, process: StubProcess
) -> None:
    process.last_heartbeat = now = time.monotonic()
    assert supervisor.state(now)[0] is WorkerState.READY
    assert supervisor.state(now + HANG_S / 2)[0] is WorkerState.UNHEALTHY
    supervisor.replace_if_hung(now + HANG_S / 2)
    assert not process.is_killed
    supervisor.replace_if_hung(now + HANG_S + 0.1)
    assert process.is_killed


def test_missed_heartbeats_do_not_count_while_the_parent_itself_was_blocked(
    supervisor: Supervisor, process: StubProcess
) -> None:
    now = time.monotonic()
    supervisor.hear(now)
    process.last_heartbeat = now
    supervisor.hear(now + HANG_S + 1)
    assert supervisor.can_answer(now + HANG_S + 1)
    # From here on it counts: the parent listens all the time.
    for second in range(int(HANG_S) + 2):
        supervisor.hear(now + HANG_S + 1 + second)
    supervisor.replace_if_hung(now + 2 * HANG_S + 2)
    assert process.is_killed


def test_a_death_is_handled_after_the_last_messages(supervisor: Supervisor, process: StubProcess, heard: Heard) -> None:
    process.say(Done(1, ()))
    process.die()
    supervisor.receive()
    assert heard.messages == [Done(1, ())]
    assert heard.ends == [-9]
    assert supervisor.pid is None


def test_a_closed_supervisor_starts_no_other_process(supervisor: Supervisor, process: StubProcess) -> None:
    supervisor.close()
    process.die()
    supervisor.receive()
    assert not supervisor.maintain(time.monotonic() + 1000)
    assert supervisor.pid is None


# When the next one starts


def test_a_process_that_was_ready_is_replaced_at_once() -> None:
    schedule = RestartSchedule(backoff_s=2.0)
    assert schedule.died(100.0, was_ready=True)
    assert schedule.is_due(100.0)


def test_a_process_that_dies_while_it_loads_is_replaced_with_growing_delays_a_few_times() -> None:
    schedule = RestartSchedule(backoff_s=2.0)
    for delay in RESTART_DELAYS:
        assert schedule.died(100.0, was_ready=False)
        assert not schedule.is_due(99.9 + 2 * delay)
        assert schedule.is_due(100.0 + 2 * delay)
    assert not schedule.died(100.0, was_ready=False)


def test_a_process_that_loaded_starts_the_count_of_failures_anew() -> None:
    schedule = RestartSchedule(backoff_s=1.0)
    for _ in range(3 * len(RESTART_DELAYS)):
        assert schedule.died(100.0, was_ready=False)
        schedule.loaded()


def test_a_schedule_that_is_over_starts_nothing() -> None:
    schedule = RestartSchedule(backoff_s=1.0)
    schedule.end()
    assert schedule.died(100.0, was_ready=True)
    assert not schedule.is_due(1e9)
