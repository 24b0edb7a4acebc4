"""A shared rate for heavy work: all threads together do no more than so much of it a second."""

from __future__ import annotations

import threading
import time


class RateLimiter:
    """Spreads work evenly over time. Thread-safe.

    The leaky bucket as a meter, without bursts (ITU-T I.371, the generic cell rate algorithm).
    """

    def __init__(self, per_s: float) -> None:
        """`per_s`: the amount of work allowed a second."""
        self._per_s = per_s
        self._free_at = 0.0
        self._lock = threading.Lock()

    def wait_s(self, amount: float) -> float:
        """Record an amount of work just done. Returns the seconds that the caller has to wait before doing more."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + amount / self._per_s
            return self._free_at - now
