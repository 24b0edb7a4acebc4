"""The rows that wait for the engine."""

import time
from concurrent.futures import ThreadPoolExecutor

from tests.support.rows import row
from worker.engine.row_queue import JoinableBatch, RowQueue
from worker.engine.scheduler import Limits

LIMITS = Limits(rows=8, tokens=10_000)
#: Seconds.
SOON, LONG = 2.0, 5.0


def test_the_engine_does_not_wait_for_rows_of_a_closed_queue() -> None:
    queue = RowQueue()
    queue.close()
    started = time.monotonic()
    queue.await_rows(max_rows=8, timeout_s=5.0)
    assert time.monotonic() - started < 1


def awaited_s(queue: RowQueue, encoded_s: float = 0.0, decoded_s: float = 0.0) -> float:
    """Seconds that a running row waits for others."""
    started = time.monotonic()
    batch = JoinableBatch(1, LIMITS, started + encoded_s, started + decoded_s)
    while queue.should_await_joining(batch):
        queue.await_change(batch)
    return time.monotonic() - started


def test_running_rows_wait_for_a_row_whose_picture_is_being_decoded_then_encoded() -> None:
    queue, expected = RowQueue(), row()
    with ThreadPoolExecutor(1) as engine:
        with queue.expecting():
            waiting = engine.submit(awaited_s, queue, LONG, LONG)
            time.sleep(0.1)
            assert not waiting.done()
            queue.add(expected)
        time.sleep(0.1)
        assert not waiting.done()
        queue.mark_ready(expected)
        assert waiting.result(SOON) < LONG


def test_running_rows_go_on_if_a_picture_cannot_be_decoded() -> None:
    queue = RowQueue()
    with ThreadPoolExecutor(1) as engine:
        with queue.expecting():
            waiting = engine.submit(awaited_s, queue, LONG, LONG)
        assert waiting.result(SOON) < LONG


def test_running_rows_wait_for_decoding_and_for_encoding_as_long_as_is_set_for_each() -> None:
    queue = RowQueue()
    with queue.expecting():
        assert awaited_s(queue, encoded_s=LONG) < SOON
        assert 0.05 <= awaited_s(queue, encoded_s=LONG, decoded_s=0.05) < SOON
    queue.add(row())
    assert awaited_s(queue, decoded_s=LONG) < SOON
    assert 0.05 <= awaited_s(queue, encoded_s=0.05, decoded_s=LONG) < SOON
