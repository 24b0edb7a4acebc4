"""Which rows run together: pure functions of the waiting and the running rows.

Rows leave in `worker/engine/continuous.py`; `worker/engine/progress.py` ends them, canceled ones too.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from worker.engine.row import Row, urgency


@dataclass(frozen=True, slots=True)
class Limits:
    """What fits on the device at once: rows, where one with four beams counts four, and tokens.

    In blocks each row counts with its own tokens; otherwise, and with beams, with those of the longest one.
    """

    rows: int
    #: Tokens with padding.
    tokens: int
    #: Tokens for which there are blocks; 0 if keys and values are not in blocks.
    block_tokens: int = 0


class Size(NamedTuple):
    """The size of a batch: its rows, the tokens of the longest, and those of all together."""

    rows: int = 0
    longest: int = 0
    tokens: int = 0

    def plus(self, row: Row) -> Size:
        """The size with one more row."""
        length = _length(row)
        return Size(self.rows + 1, max(self.longest, length), self.tokens + length)


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
    first = min(waiting, key=urgency)
    batch, size = [first], functools.reduce(Size.plus, (*running, first), Size())
    if running and not _may_join(first, size, limits, running):
        return []
    if running and in_groups and not _is_group(len(waiting), limits.rows - len(running), limits):
        return []
    companions = sorted(
        (row for row in waiting if row is not first and _group(row) == _group(first)),
        key=lambda row: (row.priority, _distance(row, first), row.arrived),
    )
    for row in companions:
        larger = size.plus(row)
        if _fits(larger, first, limits):
            batch.append(row)
            size = larger
    return batch


def _may_join(first: Row, size: Size, limits: Limits, running: Sequence[Row]) -> bool:
    """Whether the most urgent row may join. If not, none joins: the batch drains, then this row starts the next."""
    return _group(first) == _group(running[0]) and _fits(size, first, limits)


def _is_group(waiting: int, free: int, limits: Limits) -> bool:
    """Whether all waiting rows can join, or enough of them to be a group."""
    return free * JOINING_PART >= limits.rows or waiting <= free


def _group(row: Row) -> Hashable:
    """A key that is equal for rows that may share a batch: all without beams; of those with beams, like ones. A row
    that runs alone has one of its own."""
    sampling = row.sampling
    if row.alone:
        return row
    if sampling.num_beams == 1:
        return None
    has_penalty = sampling.repetition_penalty is not None
    return sampling.num_beams, sampling.max_new_tokens, sampling.eos_ids, sampling.answers, has_penalty


def _distance(row: Row, first: Row) -> tuple[int, int]:
    return abs(row.max_steps - first.max_steps), abs(len(row.tokens.ids) - len(first.tokens.ids))


def _fits(size: Size, like: Row, limits: Limits) -> bool:
    """Whether a batch of this size fits, if each row has as many beams as `like`."""
    beams = like.sampling.num_beams
    rows = size.rows * beams
    # Beams run through stock `generate`, which pads.
    in_blocks = limits.block_tokens and beams == 1
    fits = size.tokens <= limits.block_tokens if in_blocks else rows * size.longest <= limits.tokens
    return rows <= limits.rows and fits


def _length(row: Row) -> int:
    """Maximum tokens of the prompt and the answer together."""
    return len(row.tokens.ids) + row.max_steps
