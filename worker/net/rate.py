"""How much of something heavy all threads may do together."""

from __future__ import annotations

import threading
import time


class Pace:
    """Deals out time, one share after the other. Safe in threads.

    The leaky bucket as a meter, without bursts (ITU-T I.371, the generic cell rate algorithm).
    """

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._free_at = 0.0
        self._lock = threading.Lock()

    def wait_s(self, amount: float) -> float:
        """Seconds that whoever did so much has to wait before it goes on."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + amount / self._per_s
            return self._free_at - now
