"""What bounds a campaign's rate: image hosts, other jobs in the queue, the model, or the producer itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from ..errors import IdeficsError
from ..queue_state import QueueReader, QueueState
from ..worker_status import WorkerStatus

Bound = Literal["", "hosts", "queue", "model", "producer", "no worker"]

#: Seconds between two readings.
INTERVAL_S = 5.0


def bound_of(state: QueueState, workers: Iterable[WorkerStatus], priority: int, in_flight: int, window: int) -> Bound:
    """The bound of a campaign with `in_flight` jobs of this priority, of at most `window`."""
    if not state.workers:
        # None: this Redis user may not know.
        return "" if state.workers is None else "no worker"
    statuses = list(workers)
    for_hosts = sum(status.waiting_for_host for status in statuses)
    for_rows = sum(max(0, status.jobs - status.rows - status.waiting_for_host) for status in statuses)
    if for_hosts > for_rows:
        return "hosts"
    ahead = sum(count for other, count in state.by_priority.items() if other < priority)
    beside = state.by_priority.get(priority, 0) - in_flight
    if ahead > 0 or beside > in_flight:
        return "queue"
    return "producer" if in_flight < window / 2 and not state.waiting else "model"


class Bottleneck:
    """Reads the bound now and then. For one thread at a time."""

    def __init__(self, client: Any, priority: int, window: int) -> None:
        self._client = client
        self._priority = priority
        self._window = window
        self._reader: QueueReader | None = None
        self._read_at = float("-inf")
        self._bound: Bound = ""

    def bound(self, in_flight: int, now: float) -> Bound:
        """The bound at time.monotonic() `now`; the last known one for INTERVAL_S. Empty if it cannot be read."""
        if now - self._read_at >= INTERVAL_S:
            self._read_at = now
            self._bound = self._attempted(lambda: self._read(in_flight))
        return self._bound

    def _read(self, in_flight: int) -> Bound:
        if not hasattr(self._client, "app"):
            # A client of the caller's own may have none.
            return ""
        if self._reader is None:
            self._reader = QueueReader(self._client.app)
        queue = self._client.queue
        state = self._reader.read(queue).get(queue)
        if state is None:
            return ""
        statuses = self._reader.statuses(state.workers or ())
        return bound_of(state, statuses.values(), self._priority, in_flight, self._window)

    def _attempted(self, read: Callable[[], Bound]) -> Bound:
        try:
            return read()
        except (RedisError, OperationalError, IdeficsError, OSError):
            # The campaign itself says what is wrong.
            return ""
