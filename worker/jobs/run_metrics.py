"""Counts what an answered job took: the stages of its row, which are parts of its trace, its tokens and images."""

from __future__ import annotations

from tasks.payloads import PAYLOADS
from tasks.results import Usage
from worker.engine.row import Row
from worker.observability.metrics import ABSTAINED, GENERATION_TOKENS, IMAGES, PROMPT_TOKENS, STAGES
from worker.observability.tracing import add_stage

#: Made at once, so that a task without abstained jobs is exported as 0.
_ABSTAINED = {task: ABSTAINED.labels(task) for task in PAYLOADS}


def observe_row(row: Row, ended: float) -> None:
    """Observe the stages of a row that ended at time.monotonic() `ended`, if it was started."""
    if not row.started:
        return
    ready = row.ready or row.arrived
    if row.tokens.pictures:
        _observe("encode", row.arrived, ready)
    _observe("wait", ready, max(row.started, ready))
    _observe("generate", row.started, ended)


def _observe(stage: str, started: float, ended: float) -> None:
    STAGES[stage].observe(ended - started)
    add_stage(stage, started, ended)


def count_answer(usage: Usage) -> None:
    PROMPT_TOKENS.inc(usage.prompt_tokens)
    GENERATION_TOKENS.inc(usage.completion_tokens)
    IMAGES.inc(usage.images)


def count_abstained(task: str) -> None:
    _ABSTAINED[task].inc()
