"""Warns, while a command waits for jobs, if no worker takes from their queue."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import IdeficsError
from ..worker_registry import no_worker
from .console import echo

#: Seconds between two checks for a worker.
CHECK_INTERVAL_S = 3.0


def _on_standard_error(text: str) -> None:
    echo(text, err=True)


@contextlib.contextmanager
def watched(client: Any, tell: Callable[[str], None] = _on_standard_error) -> Iterator[None]:
    """During the block, call `tell` once if jobs wait and no worker takes from the client's queue."""
    is_over = threading.Event()
    threading.Thread(target=_watch, args=[client, tell, is_over], daemon=True, name="worker-watch").start()
    try:
        yield
    finally:
        is_over.set()


def is_unserved(client: Any) -> bool:
    """Whether no worker takes from the client's queue, and jobs wait there, or no worker runs at all."""
    return not client.workers() and (client.queued() > 0 or not client.models())


def _watch(client: Any, tell: Callable[[str], None], is_over: threading.Event) -> None:
    # If the workers cannot be read, the wait itself reports the error.
    with contextlib.suppress(IdeficsError):
        while not is_over.wait(CHECK_INTERVAL_S):
            if is_unserved(client):
                count = client.queued()
                waiting = "1 job waits" if count == 1 else f"{count:,} jobs wait"
                tell(f"{waiting}. {no_worker(client.queue)}")
                return
