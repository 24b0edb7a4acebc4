"""Ends a long command cleanly on Ctrl-C and SIGTERM."""

from __future__ import annotations

import signal
import time
from typing import Any

#: The exit code after Ctrl-C.
INTERRUPTED = 130
#: Seconds of sleep between two looks at whether to stop.
_NAP_S = 0.1


class Stop:
    """A stop requested by Ctrl-C or SIGTERM; a second one ends the process at once."""

    def __init__(self) -> None:
        self.is_asked = False

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def sleep(self, seconds: float) -> None:
        """Sleep, no longer than until a stop is requested."""
        end = time.monotonic() + seconds
        while not self.is_asked and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _NAP_S))

    def _ask(self, number: int, frame: Any) -> None:
        self.is_asked = True
        signal.signal(number, signal.SIG_DFL)
