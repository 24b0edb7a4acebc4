"""Blocks of keys and values: who holds which, decided without tensors."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest

from worker.engine.blocks import BlockAllocator, BlockTables, CopiedBlock, OutOfBlocks, blocks_for

SIZE = 4


def allocator(count: int = 10) -> BlockAllocator:
    return BlockAllocator(count, SIZE)


def test_a_row_has_as_many_blocks_as_its_tokens_need() -> None:
    assert [blocks_for(tokens, SIZE) for tokens in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


def test_the_null_block_is_never_taken() -> None:
    assert sorted(allocator(3).take(3)) == [1, 2, 3]


def test_the_block_released_last_is_taken_first() -> None:
    blocks = allocator()
    first = blocks.take(4)
    blocks.release(first[1:2])
    assert blocks.take(1) == first[1:2]


def test_more_blocks_than_are_free_cannot_be_taken() -> None:
    blocks = allocator(3)
    with pytest.raises(OutOfBlocks):
        blocks.take(4)
    assert blocks.free == 3


class Prefixes:
    """Holds blocks as the prefix cache does: the oldest prefix is evicted first."""

    def __init__(self, blocks: BlockAllocator) -> None:
        self.kept: list[tuple[list[int], int]] = []
        self._allocator = blocks
        blocks.holder = self

    def blocks(self) -> Iterator[int]:
        for prefix, _ in self.kept:
            yield from prefix

    def evict(self) -> bool:
        if self.kept:
            self._allocator.release(self.kept.pop(0)[0])
            return True
        return False


def test_prefixes_are_evicted_one_after_another_until_enough_blocks_are_free() -> None:
    blocks = allocator(6)
    prefixes = Prefixes(blocks)
    prefixes.kept = [(blocks.take(2), 8) for _ in range(3)]
    assert len(blocks.take(3)) == 3
    assert len(prefixes.kept) == 1


def test_no_prefix_is_evicted_if_that_frees_too_few_blocks() -> None:
    blocks = allocator(6)
    prefixes = Prefixes(blocks)
    prefixes.kept = [(blocks.take(2), 8), (blocks.take(2), 8)]
    # A row shares one of them.
    blocks.share(prefixes.kept[0][0])
    assert [blocks.can_take(count) for count in (4, 5)] == [True, False]
    with pytest.raises(OutOfBlocks):
        blocks.take(5)
    assert len(prefixes.kept) == 2


def test_a_shared_block_is_free_after_its_last_holder() -> None:
    blocks = allocator()
    shared = blocks.take(2)
    blocks.share(shared)
    assert (blocks.used, blocks.shared) == (2, 2)
    blocks.release(shared)
    assert (blocks.used, blocks.shared) == (2, 0)
    blocks.release(shared)
    assert blocks.used == 0


def test_a_block_cannot_be_released_twice_or_shared_when_free() -> None:
    blocks = allocator()
    taken = blocks.take(1)
    blocks.release(taken)
    with pytest.raises(AssertionError):
        blocks.release(taken)
    with pytest.raises(AssertionError):
        blocks.share(taken)


def test_a_spoiled_block_is_wiped_once_before_it_is_taken_again() -> None:
    blocks, wiped = allocator(4), list[int]()
    blocks.wipe = wiped.extend
    taken = blocks.take(2)
    blocks.spoil(taken)
    assert not wiped
    blocks.release(taken)
    blocks.release(blocks.take(4))
    assert sorted(wiped) == sorted(taken)
    blocks.take(4)
    assert len(wiped) == 2


def test_after_a_failure_all_blocks_are_free_and_wiped_before_they_are_taken() -> None:
    blocks, wiped = allocator(4), list[int]()
    blocks.wipe = wiped.extend
    blocks.share(blocks.take(3))
    blocks.clear()
    assert blocks.free == 4
    assert sorted(blocks.take(4)) == sorted(wiped) == [1, 2, 3, 4]


def test_a_prefix_shares_its_full_blocks_and_the_last_one_is_copied() -> None:
    blocks = allocator()
    tables = BlockTables(blocks)
    tables.begin(0, (), 0, 10)
    prefix = tables.first(0, 10)
    copied = tables.begin(1, prefix, 10, 13)
    assert tables[1][:2] == prefix[:2]
    assert copied == CopiedBlock(prefix[2], tables[1][2])
    assert len(tables[1]) == 4
    assert [blocks.references(block) for block in prefix] == [3, 3, 2]


def test_a_prefix_that_ends_with_a_block_needs_no_copy() -> None:
    tables = BlockTables(allocator())
    tables.begin(0, (), 0, 8)
    prefix = tables.first(0, 8)
    assert tables.begin(1, prefix, 8, 9) is None
    assert tables[1][:2] == prefix


def test_a_row_that_does_not_fit_takes_nothing() -> None:
    blocks = allocator(4)
    tables = BlockTables(blocks)
    tables.begin(0, (), 0, 6)
    prefix = tables.first(0, 6)
    with pytest.raises(OutOfBlocks):
        tables.begin(1, prefix, 6, 17)
    assert not tables[1]
    assert [blocks.references(block) for block in prefix] == [2, 2]


def test_a_row_keeps_the_prefix_that_it_begins_with() -> None:
    blocks = allocator(3)
    tables, prefixes = BlockTables(blocks), Prefixes(blocks)
    tables.begin(0, (), 0, 6)
    prefixes.kept = [(tables.first(0, 6), 6)]
    tables.release(0)
    # One block is free, and evicting the prefix would free none: the row shares the first, and copies the second.
    with pytest.raises(OutOfBlocks):
        tables.begin(1, *prefixes.kept[0], 12)
    assert tables.begin(1, *prefixes.kept[0], 8)
    assert (blocks.used, blocks.shared) == (3, 1)


def test_a_row_grows_by_a_block_when_its_last_one_is_full() -> None:
    tables = BlockTables(allocator())
    tables.begin(0, (), 0, 4)
    assert [tables.missing(0, tokens) for tokens in (4, 5, 9)] == [0, 1, 2]
    assert [tables.reserve(0, tokens) for tokens in (4, 5, 6)] == [False, True, False]
    assert len(tables[0]) == 2


@pytest.mark.parametrize("seed", range(20))
def test_no_block_is_lost_or_held_twice_in_any_order_of_operations(seed: int) -> None:
    dice, blocks = random.Random(seed), allocator(40)
    tables = BlockTables(blocks)
    rows: dict[int, int] = {}
    cache = Prefixes(blocks)
    prefixes = cache.kept

    def begin() -> None:
        slot = min(set(range(len(rows) + 1)) - set(rows))
        prefix, length = dice.choice(prefixes) if prefixes and dice.random() < 0.6 else ([], 0)
        tokens = length + dice.randint(1, 30)
        tables.begin(slot, prefix, length, tokens)
        rows[slot] = tokens

    def grow() -> None:
        if rows:
            slot = dice.choice(list(rows))
            tables.reserve(slot, rows[slot] + 1)
            rows[slot] += 1

    def keep() -> None:
        if rows:
            slot = dice.choice(list(rows))
            length = dice.randint(1, rows[slot])
            prefixes.append((tables.first(slot, length), length))

    def end() -> None:
        if rows:
            slot = dice.choice(list(rows))
            tables.release(slot)
            del rows[slot]

    def move() -> None:
        target = max(rows, default=0) + 1
        if rows:
            source = dice.choice(list(rows))
            tables.move(source, target)
            rows[target] = rows.pop(source)

    for _ in range(500):
        try:
            dice.choice([begin, grow, grow, keep, end, move, cache.evict])()
        except OutOfBlocks:
            end()
        held = Counter(block for slot in rows for block in tables[slot])
        held.update(block for prefix, _ in prefixes for block in prefix)
        assert {block: blocks.references(block) for block in range(1, 41) if blocks.references(block)} == held
        assert blocks.used == len(held)
        assert all(len(tables[slot]) == blocks_for(tokens, SIZE) for slot, tokens in rows.items())
        # No row writes into a block that another one reads: only full blocks are shared among rows.
        writable = [tables[slot][tokens // SIZE] for slot, tokens in rows.items() if tokens % SIZE]
        assert all(sum(block in tables[slot] for slot in rows) == 1 for block in writable)
    for slot in rows:
        tables.release(slot)
    while cache.evict():
        pass
    assert blocks.free == 40
