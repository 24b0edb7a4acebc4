"""The pause after a broker refused a request, and how often refusals are logged."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)

#: Seconds without a reserve after the broker refused one.
BACKOFF_S = 1.0
#: Seconds between two log lines about refusals.
COMPLAINT_INTERVAL_S = 30.0


class Backoff:
    """A channel's pause between requests. Times are those of `time.monotonic`."""

    def __init__(self) -> None:
        self._until = 0.0
        self._complained_at = float("-inf")

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._until

    def pause_until(self, moment: float) -> None:
        self._until = moment

    def refused(self, error: Exception) -> None:
        """Pause for BACKOFF_S after a refusal."""
        self.pause_until(time.monotonic() + BACKOFF_S)
        self.complain(error)

    def complain(self, error: Exception) -> None:
        """Log a refusal, at most once in COMPLAINT_INTERVAL_S."""
        now = time.monotonic()
        if now - self._complained_at >= COMPLAINT_INTERVAL_S:
            self._complained_at = now
            logger.error("The broker refuses or is away (%s): the worker tries again.", error)
