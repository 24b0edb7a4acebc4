"""The rows that wait for the engine."""

import time

from worker.engine.row_queue import RowQueue


def test_the_engine_does_not_wait_for_rows_of_a_closed_queue() -> None:
    queue = RowQueue()
    queue.close()
    started = time.monotonic()
    queue.await_rows(max_rows=8, timeout_s=5.0)
    assert time.monotonic() - started < 1
