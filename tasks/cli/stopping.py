"""Ends a long command cleanly on Ctrl-C and SIGTERM."""

from __future__ import annotations

import signal
from typing import Any

#: The exit code after Ctrl-C.
INTERRUPTED = 130


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

    def _ask(self, number: int, frame: Any) -> None:
        self.is_asked = True
        signal.signal(number, signal.SIG_DFL)
