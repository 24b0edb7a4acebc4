"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

#: Seconds that a test waits for another process: a model may take a minute to load on a busy machine.
PATIENCE_S = 120.0
#: Seconds that a test waits for another thread.
SOON_S = 20.0


def eventually(holds: Callable[[], Any], timeout: float = PATIENCE_S) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)
