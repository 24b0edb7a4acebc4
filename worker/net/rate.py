"""A rate limit for heavy work that all threads share."""

from __future__ import annotations

import threading
import time


class RateLimiter:
    """Spreads work evenly over time. Thread-safe.

    Algorithm: the leaky bucket as a meter, without bursts (generic cell rate algorithm, ITU-T I.371).
    """

    def __init__(self, per_s: float) -> None:
        """`per_s`: the amount of work allowed a second."""
        self._per_s = per_s
        self._free_at = 0.0
        self._lock = threading.Lock()

    def wait_s(self, amount: float) -> float:
        """Record an amount of finished work. Returns the seconds that the caller must wait before it does more."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + amount / self._per_s
            return self._free_at - now
