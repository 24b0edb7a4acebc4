"""Which rows run together: pure functions of what waits."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from worker.engine.row import Row


@dataclass(frozen=True, slots=True)
class Limits:
    """What fits on the device at once: rows (a row with four beams counts four) and padded tokens."""

    rows: int
    tokens: int


#: While others run and more wait than fit, rows join in groups of at least one JOINING_PART-th of the limit: each group
#: costs the running rows the time of a prefill.
JOINING_PART = 8
#: A step of a few rows costs nearly what a step of a full batch costs. So a batch that is filled to less than FULL_PART
#: waits for rows whose pictures are being encoded, unless it holds up more than HELD_UP running rows for each of them.
FULL_PART = 0.75
HELD_UP = 4


def should_wait(running: int, waiting: int, encoding: int, limits: Limits) -> bool:
    """Whether a batch should wait for more rows, given the numbers of those that run, that wait, and whose pictures are
    being encoded."""
    return encoding > 0 and running <= HELD_UP * (encoding + waiting) and running + waiting < FULL_PART * limits.rows


def next_batch(
    waiting: Sequence[Row], limits: Limits, running: Sequence[Row] = (), *, in_groups: bool = True
) -> list[Row]:
    """The rows to run next, of those that wait, or with `running` those that join them; few at a time only if
    `in_groups` is False.

    The first is the oldest of the most urgent priority, so that no row starves. With it go the rows that it can share
    a batch with, those nearest to it in `max_steps` first: a batch lasts as long as its longest row. A row too large
    for the limits runs alone.
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
    """Whether the most urgent row may join. If not, no other row overtakes it: the batch drains, then it starts."""
    return _group(first) == _group(running[0]) and _fits(len(running) + 1, longest, first, limits)


def _is_group(waiting: int, free: int, limits: Limits) -> bool:
    """Whether enough rows can join at once, or all that wait."""
    return free * JOINING_PART >= limits.rows or waiting <= free


def _group(row: Row) -> Hashable:
    """Rows of one group may share a batch: greedy, sampled and scored rows; beams with beams of the same kind."""
    sampling = row.sampling
    if sampling.num_beams == 1:
        return None
    return sampling.num_beams, sampling.max_new_tokens, sampling.eos_ids


def _distance(row: Row, first: Row) -> tuple[int, int]:
    return abs(row.max_steps - first.max_steps), abs(len(row.tokens.ids) - len(first.tokens.ids))


def _fits(rows: int, longest: int, like: Row, limits: Limits) -> bool:
    """Whether `rows` rows like that one fit, the longest of `longest` tokens."""
    rows *= like.sampling.num_beams
    return rows <= limits.rows and rows * longest <= limits.tokens


def _length(row: Row) -> int:
    """Tokens of the prompt and the answer, at most."""
    return len(row.tokens.ids) + row.max_steps
