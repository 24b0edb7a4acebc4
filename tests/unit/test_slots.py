"""Slots of a batch: which are free, and what moves where."""

from __future__ import annotations

import random

import pytest

from worker.engine.slots import GAPS_PART, SlotTable


def table(*lengths: int) -> SlotTable:
    """A table whose slots hold rows of these lengths, none where it is 0."""
    made = SlotTable()
    made.take([max(1, length) for length in lengths], [bool(length % 2) for length in lengths], at_end=True)
    made.lengths[:] = lengths
    made.has_extra[:] = [bool(length % 2) for length in lengths]
    return made


def test_rows_fill_gaps_before_they_take_new_slots() -> None:
    slots = table(5, 0, 7, 0, 9)
    assert slots.take([2, 3, 4], [True, False, True], at_end=False) == [1, 3, 5]
    assert slots.lengths == [5, 2, 7, 3, 9, 4]
    assert slots.has_extra == [True, True, True, False, True, True]


def test_rows_that_stand_in_order_leave_gaps() -> None:
    assert table(5, 0, 7).take([2, 3], [False, False], at_end=True) == [3, 4]


def test_a_step_lengthens_rows_and_leaves_free_slots_free() -> None:
    slots = table(5, 0, 7)
    slots.advance()
    assert slots.lengths == [6, 0, 8]
    assert slots.longest == 8


def test_free_slots_at_the_end_are_forgotten() -> None:
    slots = table(5, 0, 7, 9)
    slots.release([2, 3])
    assert slots.lengths == [5]
    slots.release([0])
    assert len(slots) == slots.longest == 0


def test_few_gaps_are_left() -> None:
    slots = table(1, 0, 1, 1)
    assert slots.compact() == []
    assert slots.lengths == [1, 0, 1, 1]


def test_the_last_rows_move_to_the_gaps() -> None:
    slots = table(5, 0, 6, 0, 8)
    assert slots.compact() == [(4, 1)]
    assert slots.lengths == [5, 8, 6]
    assert slots.has_extra == [True, False, False]


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_where_the_moves_say(seed: int) -> None:
    dice, slots, rows = random.Random(seed), SlotTable(), dict[int, int]()
    for step in range(200):
        lengths = [dice.randint(1, 9) * 10_000 + step for _ in range(dice.randrange(4))]
        found = slots.take(lengths, [False] * len(lengths), at_end=dice.random() < 0.3)
        assert not set(found) & set(rows)
        rows |= dict(zip(found, lengths, strict=True))
        over = [slot for slot in rows if dice.random() < 0.3]
        slots.release(over)
        rows = {slot: length for slot, length in rows.items() if slot not in over}
        moves = slots.compact()
        assert not {source for source, _ in moves} & {target for _, target in moves}
        for source, target in moves:
            rows[target] = rows.pop(source)
        assert {slot: length for slot, length in enumerate(slots.lengths) if length} == rows
        assert len(slots.gaps) * GAPS_PART <= len(slots)
