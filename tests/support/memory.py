"""How much memory a call takes at its peak."""

import tracemalloc
from collections.abc import Callable

ATTEMPTS = 3


def peak_memory(call: Callable[[], object], expected_below: int) -> int:
    """Bytes that Python allocated at most while `call` ran.

    Other threads of the test process allocate too, and a first call loads modules.
    So a call that took more than `expected_below` is repeated, and the lowest peak counts.
    """
    lowest = _peak_of_one(call)
    for _ in range(ATTEMPTS - 1):
        if lowest < expected_below:
            break
        lowest = min(lowest, _peak_of_one(call))
    return lowest


def _peak_of_one(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
