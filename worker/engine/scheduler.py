"""Which rows run together: pure functions of the waiting and the running rows.

Rows leave in `worker/engine/continuous.py`; `worker/engine/progress.py` ends them, canceled ones too.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from worker.engine.row import Row


@dataclass(frozen=True, slots=True)
class Limits:
    """What fits on the device at once: rows, where one with four beams counts four, and tokens with padding."""

    rows: int
    tokens: int


#: While others run and more wait than fit, rows join in groups of at least limit / JOINING_PART: each group delays the
#: running rows by a prefill.
JOINING_PART = 8
#: A step of a few rows takes nearly as long as a step of a full batch. So a batch with less than FULL_PART of the limit
#: waits for rows whose pictures are being encoded, unless this delays more than MAX_DELAYED running rows for each
#: of them.
FULL_PART = 0.75
MAX_DELAYED = 4


def should_wait(running: int, waiting: int, encoding: int, limits: Limits) -> bool:
    """Whether a batch should wait for more rows. `encoding`: the number of rows whose pictures are being encoded."""
    return (
        encoding > 0 and running <= MAX_DELAYED * (encoding + waiting) and running + waiting < FULL_PART * limits.rows
    )


def next_batch(
    waiting: Sequence[Row], limits: Limits, running: Sequence[Row] = (), *, in_groups: bool = True
) -> list[Row]:
    """Choose the waiting rows that form the next batch, or that join the `running` rows.

    The first one is the oldest of the most urgent priority, so that no row starves. Rows that can share its batch
    follow, the nearest in `max_steps` first, since a batch lasts as long as its longest row. A row beyond the limits
    runs alone. `in_groups`: join running rows only in groups (see JOINING_PART).
    """
    if not waiting:
        return []
    first = min(waiting, key=lambda row: (row.priority, row.arrived))
    batch, longest = [first], max(map(_length, (*running, first)))
    if running and not _may_join(first, longest, limits, running):
        return []
    if running and in_groups and not _is_group(len(waiting), limits.rows - len(running), limits):
        return []
    companions = sorted(
        (row for row in waiting if row is not first and _group(row) == _group(first)),
        key=lambda row: (row.priority, _distance(row, first), row.arrived),
    )
    for row in companions:
        longer = max(longest, _length(row))
        if _fits(len(running) + len(batch) + 1, longer, first, limits):
            batch.append(row)
            longest = longer
    return batch


def _may_join(first: Row, longest: int, limits: Limits, running: Sequence[Row]) -> bool:
    """Whether the most urgent row may join. If not, none joins: the batch drains, then this row starts the next."""
    return _group(first) == _group(running[0]) and _fits(len(running) + 1, longest, first, limits)


def _is_group(waiting: int, free: int, limits: Limits) -> bool:
    """Whether all waiting rows can join, or enough of them to be a group."""
    return free * JOINING_PART >= limits.rows or waiting <= free


def _group(row: Row) -> Hashable:
    """A key that is equal for rows that may share a batch: all without beams; of those with beams, like ones."""
    sampling = row.sampling
    if sampling.num_beams == 1:
        return None
    return sampling.num_beams, sampling.max_new_tokens, sampling.eos_ids


def _distance(row: Row, first: Row) -> tuple[int, int]:
    return abs(row.max_steps - first.max_steps), abs(len(row.tokens.ids) - len(first.tokens.ids))


def _fits(rows: int, longest: int, like: Row, limits: Limits) -> bool:
    """Whether this many rows fit, if the longest has `longest` tokens and each as many beams as `like`."""
    rows *= like.sampling.num_beams
    return rows <= limits.rows and rows * longest <= limits.tokens


def _length(row: Row) -> int:
    """Maximum tokens of the prompt and the answer together."""
    return len(row.tokens.ids) + row.max_steps
