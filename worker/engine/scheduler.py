"""Which rows run together: a pure function of what waits."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from worker.engine.row import Row


@dataclass(frozen=True, slots=True)
class Limits:
    """What fits on the device at once: rows (a row with four beams counts four) and padded tokens."""

    rows: int
    tokens: int


#: While others run and more wait than fit, newcomers come in groups of this part of the batch at least: each group
#: costs the running rows a prompt's time.
JOINING_PART = 8
#: A step costs a part of a batch nearly what it costs the whole: below this part, it waits for rows that come soon,
#: unless these are fewer than one for so many that would be held up.
FULL_PART = 0.75
HELD_UP = 4


def worth_waiting(running: int, waiting: int, coming: int, limits: Limits) -> bool:
    """Whether a batch of so many running rows should wait for more, given those that wait and those that come soon."""
    return coming > 0 and running <= HELD_UP * (coming + waiting) and running + waiting < FULL_PART * limits.rows


def next_batch(
    waiting: Sequence[Row], limits: Limits, running: Sequence[Row] = (), *, in_groups: bool = True
) -> list[Row]:
    """The rows to run next, of those that wait; with `running`, those that join them, few at a time only where
    `in_groups` is off.

    The first is the oldest of the most urgent priority, so that nobody starves. With it go the rows that it can
    share a batch with, those nearest to it in wanted length first: a batch lasts as long as its longest row.
    A row too large for the limits runs alone.
    """
    if not waiting:
        return []
    head = min(waiting, key=lambda row: (row.priority, row.arrived))
    batch, longest = [head], max(map(_length, (*running, head)))
    if running and not _may_join(head, longest, limits, running):
        return []
    if running and in_groups and not _is_group(len(waiting), limits.rows - len(running), limits):
        return []
    companions = sorted(
        (row for row in waiting if row is not head and _group(row) == _group(head)),
        key=lambda row: (row.priority, _distance(row, head), row.arrived),
    )
    for row in companions:
        longer = max(longest, _length(row))
        if _fits(len(running) + len(batch) + 1, longer, head, limits):
            batch.append(row)
            longest = longer
    return batch


def _may_join(head: Row, longest: int, limits: Limits, running: Sequence[Row]) -> bool:
    """Nobody overtakes a head that cannot join: the batch drains, and then the head is the first."""
    return _group(head) == _group(running[0]) and _fits(len(running) + 1, longest, head, limits)


def _is_group(waiting: int, free: int, limits: Limits) -> bool:
    """Whether enough can join at once, or all that wait."""
    return free * JOINING_PART >= limits.rows or waiting <= free


def _group(row: Row) -> Hashable:
    """Greedy, sampled and scored rows share a batch; beams share one with their like only."""
    sampling = row.sampling
    if sampling.num_beams == 1:
        return None
    return sampling.num_beams, sampling.max_new_tokens, sampling.end_ids


def _distance(row: Row, head: Row) -> tuple[int, int]:
    return abs(row.wanted - head.wanted), abs(len(row.tokens.ids) - len(head.tokens.ids))


def _fits(rows: int, longest: int, like: Row, limits: Limits) -> bool:
    """Whether so many rows like that one fit, the longest of so many tokens."""
    rows *= like.sampling.num_beams
    return rows <= limits.rows and rows * longest <= limits.tokens


def _length(row: Row) -> int:
    """Tokens, at most."""
    return len(row.tokens.ids) + row.wanted
