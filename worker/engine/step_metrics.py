"""Counts what the engine's thread does: steps, and seconds in each phase."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from worker.observability.metrics import PHASES, STEP_ROWS, STEPS


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Add the time of a block, or of a function as its decorator, to a phase of `ENGINE_SECONDS`.

    A GPU works asynchronously: what a block does not wait for counts for the next one that waits.
    """
    started = time.monotonic()
    try:
        yield
    finally:
        PHASES[name].inc(time.monotonic() - started)


def count_step(rows: int) -> None:
    """Count a step of `rows` rows."""
    STEPS.inc()
    STEP_ROWS.observe(rows)
