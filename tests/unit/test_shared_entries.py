"""Entries that slots with the same content share."""

from __future__ import annotations

import random

import pytest

from worker.engine.shared_entries import NO_ENTRY, SharedEntries


def test_slots_with_the_same_content_share_an_entry() -> None:
    entries = SharedEntries()
    for slot, content in enumerate("abab"):
        entries.take(slot, content)
    assert [entries[slot] for slot in range(5)] == [1, 2, 1, 2, NO_ENTRY]
    assert (len(entries), entries.used) == (3, 2)


def test_an_entry_is_free_after_its_last_slot_and_the_lowest_is_taken_first() -> None:
    entries = SharedEntries()
    for slot, content in enumerate("aab"):
        entries.take(slot, content)
    entries.release(0)
    assert entries.used == 2
    entries.release(1)
    entries.take(3, "c")
    assert (entries[3], entries[2], entries.used) == (1, 2, 2)


def test_an_entry_moves_with_its_slot() -> None:
    entries = SharedEntries()
    entries.take(5, "a")
    entries.move(5, 0)
    entries.move(4, 1)
    assert [entries[slot] for slot in (0, 1, 5)] == [1, NO_ENTRY, NO_ENTRY]
    entries.clear()
    assert (len(entries), entries.used) == (1, 0)


def test_a_slot_shares_the_entry_of_another() -> None:
    entries = SharedEntries()
    entries.take(5, "a")
    entries.share(5, 0)
    entries.share(4, 1)
    entries.release(5)
    assert [entries[slot] for slot in (0, 1, 5)] == [1, NO_ENTRY, NO_ENTRY]
    assert entries.used == 1


@pytest.mark.parametrize("seed", range(10))
def test_each_content_in_use_has_one_entry(seed: int) -> None:
    dice, entries, held = random.Random(seed), SharedEntries(), dict[int, str]()
    for _ in range(300):
        slot = dice.randrange(20)
        if slot in held:
            entries.release(slot)
            del held[slot]
        else:
            held[slot] = dice.choice("abcdef")
            entries.take(slot, held[slot])
        by_content = {content: {entries[slot] for slot in held if held[slot] == content} for content in held.values()}
        assert all(len(found) == 1 for found in by_content.values())
        assert entries.used == len(by_content) == len({entries[slot] for slot in held})
        assert len(entries) == max((entries[slot] for slot in held), default=0) + 1
