"""What the pool counts: how jobs end, replaced model processes, quarantines, redeliveries."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from billiard.einfo import ExceptionInfo
from billiard.exceptions import Terminated
from celery.exceptions import Ignore, Reject, Retry

from config.settings import Settings
from tasks.errors import ImageUnreachable
from tasks.protocol import SUBMITTED_AT
from tests.unit.pool.bench import HANG_S, Bench, StubProcess
from tests.unit.pool.test_supervisor import Heard
from worker.observability.metrics import WORKER
from worker.pool.job_metrics import count_end, count_error
from worker.pool.supervisor import Supervisor
from worker.pool.wire import DEVICE_LOST, Ready
from worker.queue.redeliveries import History

TASK = "idefics.caption"


def growth(sample: str, **labels: str) -> Callable[[], float]:
    """How much a sample has grown since this call."""

    def value() -> float:
        return WORKER.get_sample_value(sample, labels) or 0.0

    before = value()
    return lambda: value() - before


def raised(error: BaseException) -> BaseException:
    """An error as billiard wraps it for another process."""
    try:
        raise error
    except BaseException:
        return ExceptionInfo().exception  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (ImageUnreachable("x"), "failed", "image_unreachable"),
        (KeyError("x"), "failed", "internal"),
        (Reject("x", requeue=True), "returned", ""),
    ],
)
def test_an_error_is_counted_by_state_and_code(error: Exception, state: str, code: str) -> None:
    jobs = growth("idefics_jobs_total", task=TASK, state=state, code=code)
    for each in (error, raised(error)):
        count_error(TASK, {}, each)
    assert jobs() == 2


@pytest.mark.parametrize(("cause", "code"), [(ImageUnreachable("x"), "image_unreachable"), (None, "")])
def test_a_retry_is_counted_by_its_cause(cause: Exception | None, code: str) -> None:
    retries = growth("idefics_job_retries_total", task=TASK, code=code)
    count_error(TASK, {}, raised(Retry("later", exc=cause)))
    assert retries() == 1


@pytest.mark.parametrize("error", [Ignore(), Terminated("canceled")])
def test_an_end_that_is_counted_elsewhere_is_not_counted_twice(error: Exception) -> None:
    jobs = growth("idefics_jobs_total", task=TASK, state="failed", code="internal")
    count_error(TASK, {}, raised(error))
    assert jobs() == 0


def test_the_latency_counts_from_the_submission_if_the_message_says_when_it_was() -> None:
    name = "idefics_e2e_request_latency_seconds"
    count, seconds = growth(f"{name}_count", task=TASK), growth(f"{name}_sum", task=TASK)
    count_end(TASK, {}, "succeeded")
    count_end(TASK, {SUBMITTED_AT: time.time() - 5}, "canceled")
    assert count() == 0
    count_end(TASK, {SUBMITTED_AT: time.time() - 5}, "succeeded")
    assert count() == 1
    assert seconds() == pytest.approx(5, abs=1)


class Dying(StubProcess):
    """A process that ends with an exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(pid=1)
        self._status = status

    def end(self, grace_s: float = 0.0) -> int:
        return self._status


def supervised(process: StubProcess) -> Supervisor:
    supervisor = Supervisor(Settings(), "worker@here", lambda why: None, lambda hostname: process)
    supervisor.listen(Heard())
    supervisor.maintain(time.monotonic())
    process.say(Ready())
    supervisor.receive()
    return supervisor


@pytest.mark.parametrize(
    ("status", "cause"), [(DEVICE_LOST, "device_lost"), (-9, "killed"), (-11, "crashed"), (1, "exited")]
)
def test_a_replaced_process_is_counted_by_its_status(status: int, cause: str) -> None:
    restarts = growth("idefics_model_process_restarts_total", cause=cause)
    process = Dying(status)
    supervisor = supervised(process)
    process.die()
    supervisor.receive()
    assert restarts() == 1


def test_a_process_that_was_killed_is_counted_by_the_reason() -> None:
    hung, killed = (growth("idefics_model_process_restarts_total", cause=cause) for cause in ("hung", "killed"))
    supervisor = supervised(Dying(-9))
    supervisor.replace_if_hung(time.monotonic() + HANG_S + 1)
    supervisor.receive()
    assert (hung(), killed()) == (1, 0)


def test_suspects_of_a_death_are_counted(started: Bench) -> None:
    quarantined = growth("idefics_quarantined_jobs_total")
    started.submit("a", "b", "c")
    started.die_and_restart()
    assert quarantined() == 3


def test_a_job_that_a_lost_worker_had_is_counted(started: Bench) -> None:
    redeliveries = growth("idefics_redeliveries_total")
    started.submit("new")
    # The message's own flag proves nothing.
    started.submit("claims", redelivered=True)
    assert redeliveries() == 0
    started.ledger.histories["lost", 0] = History(1, 1)
    started.submit("lost", redelivered=True)
    assert redeliveries() == 1
