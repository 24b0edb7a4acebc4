"""Permits to run Python: a semaphore that keeps most job threads off the interpreter's lock (GIL).

Python runs one thread at a time, and switches threads when the running one waits or calls into C. With a hundred job
threads it nearly always switches to another job thread, and the engine's thread has to wait. So job threads run Python
only while they hold a permit, and release it while they wait.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

#: Seconds after which a thread runs without a permit: the holder may be waiting for a server, or for this thread.
MAX_WAIT_S = 1.0

# One for the process, as the GIL.
_permits = threading.Semaphore(1)
_thread = threading.local()


def set_permits(count: int) -> None:
    """Set how many threads may hold a permit at once. To be called before the first one is acquired."""
    global _permits
    _permits = threading.Semaphore(count)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Hold a permit. Not to be nested in one thread."""
    _acquire()
    try:
        yield
    finally:
        _release()
        del _thread.has_permit


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Release this thread's permit while it waits, and acquire one again. Does nothing in a thread outside `held`."""
    if not hasattr(_thread, "has_permit"):
        yield
        return
    _release()
    try:
        yield
    finally:
        _acquire()


def _acquire() -> None:
    _thread.has_permit = _permits.acquire(timeout=MAX_WAIT_S)


def _release() -> None:
    if _thread.has_permit:
        _permits.release()
