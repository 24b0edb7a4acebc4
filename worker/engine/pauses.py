"""Work in parts, with pauses between them: the engine steps the running rows and sends a heartbeat at each."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
#: A generator that yields wherever the running rows may take a step, and returns a result.
Pauses = Generator[None, None, T]


def without_pauses(work: Pauses[T], heartbeat: Callable[[], None] = lambda: None) -> T:
    """Do all of the work at once, with a heartbeat at each pause. Returns its result."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result
        heartbeat()
