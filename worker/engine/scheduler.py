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

    In blocks each row counts with its own tokens; otherwise with those of the longest one.
    """

    rows: int
    #: Tokens with padding.
    tokens: int
    #: Tokens for which there are blocks; 0 if keys and values are not in blocks.
    block_tokens: int = 0


class Size(NamedTuple):
    """The size of a batch: its rows, each counted once for each of its beams, the tokens of the longest, and those of
    all together: beams share their prompt."""

    rows: int = 0
    longest: int = 0
    tokens: int = 0

    def plus(self, row: Row) -> Size:
        """The size with one more row."""
        prompt, beams = len(row.tokens.ids), row.sampling.num_beams
        longest = max(self.longest, prompt + row.max_steps)
        return Size(self.rows + beams, longest, self.tokens + prompt + beams * row.max_steps)


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
    free = limits.rows - sum(row.sampling.num_beams for row in running)
    if running and in_groups and not _is_group(len(waiting), free, limits):
        return []
    companions = sorted(
        (row for row in waiting if row is not first and _group(row) == _group(first)),
        key=lambda row: (row.priority, _distance(row, first), row.arrived),
    )
    for row in companions:
        larger = size.plus(row)
        if _fits(larger, limits):
            batch.append(row)
            size = larger
    return batch


def _may_join(first: Row, size: Size, limits: Limits, running: Sequence[Row]) -> bool:
    """Whether the most urgent row may join. If not, none joins: the batch drains, then this row starts the next."""
    return _group(first) == _group(running[0]) and _fits(size, limits)


def _is_group(waiting: int, free: int, limits: Limits) -> bool:
    """Whether all waiting rows can join, or enough of them to be a group."""
    return free * JOINING_PART >= limits.rows or waiting <= free


def _group(row: Row) -> Hashable:
    """A key that is equal for rows that may share a batch: all, but for a row that runs alone."""
    return row if row.alone else None


def _distance(row: Row, first: Row) -> tuple[int, int]:
    return abs(row.max_steps - first.max_steps), abs(len(row.tokens.ids) - len(first.tokens.ids))


def _fits(size: Size, limits: Limits) -> bool:
    """Whether a batch of this size fits."""
    in_blocks = size.tokens <= limits.block_tokens
    fits = in_blocks if limits.block_tokens else size.rows * size.longest <= limits.tokens
    return size.rows <= limits.rows and fits
