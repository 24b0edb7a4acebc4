"""Turns at the interpreter: few job threads run Python at a time, and the others wait without asking for it.

Python runs one thread at a time, and hands over whenever that one waits or calls into C. With a hundred job threads
each such moment is a switch to another of them, and the engine's thread finds the interpreter taken.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

#: Seconds after which a thread goes on without its turn: who has it may wait for a server, or for that very thread.
PATIENCE_S = 1.0

_free = threading.Semaphore(1)
_mine = threading.local()


def allow(count: int) -> None:
    """So many at a time. Call before the first is taken."""
    global _free
    _free = threading.Semaphore(count)


@contextlib.contextmanager
def taken() -> Iterator[None]:
    """Run in a turn."""
    _take()
    try:
        yield
    finally:
        _give_up()
        del _mine.is_taken


@contextlib.contextmanager
def given_up() -> Iterator[None]:
    """Let others run while this thread waits, and take another turn after it. Outside of a turn it does nothing."""
    if not hasattr(_mine, "is_taken"):
        yield
        return
    _give_up()
    try:
        yield
    finally:
        _take()


def _take() -> None:
    _mine.is_taken = _free.acquire(timeout=PATIENCE_S)


def _give_up() -> None:
    if _mine.is_taken:
        _free.release()
