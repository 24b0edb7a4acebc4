"""When a worker that is asked to stop is overdue."""

from __future__ import annotations

import signal

import pytest

from worker.runtime.exit_watchdog import HeldWork, StopRequest

RUNNING, QUIET = HeldWork(is_running=True, has_messages=True), HeldWork(is_running=False, has_messages=False)


def _stop(*, soft_s: float = 60.0, is_remapped: bool = False) -> StopRequest:
    return StopRequest(soft_s, is_remapped=is_remapped)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT, signal.SIGINT])
def test_an_idle_workers_overdue_time_counts_from_the_signal(number: int) -> None:
    stop = _stop(soft_s=0.0)
    stop.hear(number, 100.0)
    stop.see(QUIET, 101.0)
    assert stop.overdue_s(103.0) == 3.0


def test_a_soft_stop_does_not_wait_out_its_time_where_nothing_runs() -> None:
    stop = _stop()
    stop.hear(signal.SIGQUIT, 100.0)
    stop.see(RUNNING, 110.0)
    stop.see(QUIET, 111.0)
    assert stop.overdue_s(112.0) == 2.0


def test_a_warm_stop_waits_for_what_runs() -> None:
    stop = _stop()
    stop.hear(signal.SIGTERM, 100.0)
    stop.see(RUNNING, 10_000.0)
    assert stop.overdue_s(10_000.0) == 0.0


@pytest.mark.parametrize(
    ("signals", "is_remapped"),
    [([signal.SIGQUIT], False), ([signal.SIGTERM], True), ([signal.SIGINT, signal.SIGINT], False)],
)
def test_a_cold_stop_waits_for_its_time_at_most(signals: list[int], is_remapped: bool) -> None:
    stop = _stop(is_remapped=is_remapped)
    for number in signals:
        stop.hear(number, 100.0)
    stop.see(RUNNING, 170.0)
    assert stop.overdue_s(170.0) == 10.0
    assert stop.exit_code == 1


def test_a_cold_stop_that_is_asked_for_twice_waits_no_longer() -> None:
    stop = _stop()
    stop.hear(signal.SIGQUIT, 100.0)
    stop.hear(signal.SIGQUIT, 105.0)
    stop.see(RUNNING, 106.0)
    assert stop.overdue_s(106.0) == 1.0


def test_a_warm_stop_becomes_a_cold_one() -> None:
    stop = _stop(soft_s=5.0)
    stop.hear(signal.SIGTERM, 100.0)
    stop.see(RUNNING, 130.0)
    stop.hear(signal.SIGQUIT, 130.0)
    stop.see(RUNNING, 136.0)
    assert stop.overdue_s(136.0) == 1.0


def test_other_signals_ask_for_nothing() -> None:
    stop = _stop()
    stop.hear(signal.SIGCHLD, 100.0)
    assert not stop.is_asked
    assert stop.overdue_s(1_000_000.0) < 0
