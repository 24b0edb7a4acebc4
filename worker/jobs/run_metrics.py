"""Counts what an answered job took: the stages of its row, its tokens and images."""

from __future__ import annotations

from tasks.results import Usage
from worker.engine.row import Row
from worker.observability.metrics import GENERATION_TOKENS, IMAGES, PROMPT_TOKENS, STAGES


def observe_row(row: Row, ended: float) -> None:
    """Observe the stages of a row that ended at time.monotonic() `ended`, if it was started."""
    if not row.started:
        return
    ready = row.ready or row.arrived
    if row.tokens.pictures:
        STAGES["encode"].observe(ready - row.arrived)
    STAGES["wait"].observe(max(0.0, row.started - ready))
    STAGES["generate"].observe(ended - row.started)


def count_answer(usage: Usage) -> None:
    PROMPT_TOKENS.inc(usage.prompt_tokens)
    GENERATION_TOKENS.inc(usage.completion_tokens)
    IMAGES.inc(usage.images)
