"""Keys and values in blocks: a row costs what it is long, and rows share the blocks of common prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from worker.engine.blocks import (
    NULL_BLOCK,
    BlockAllocator,
    BlockHolder,
    BlockTables,
    CopiedBlock,
    blocks_for,
)
from worker.engine.cuda_graphs import bucket
from worker.engine.interfaces import CacheSpec, PendingPrompt, Prefix
from worker.engine.kv_cache import KVCache
from worker.engine.shared_entries import SharedEntries
from worker.engine.slots import Move
from worker.engine.tensors import to_device, upload

#: Minimum width of block tables, which are rounded up to powers of two.
MIN_WIDTH = 4


class BlockPool:
    """The blocks of all layers, allocated once."""

    def __init__(self, spec: CacheSpec, blocks: int) -> None:
        """`blocks`: blocks that rows can take. Two more are reserved: NULL_BLOCK, and the last one, where the keys and
        values of padding are written."""
        kv, block_tokens = spec.self_kv, spec.block_tokens
        self._device = spec.device
        self._whole = zeros((2 * kv.layers, blocks + 2, block_tokens, kv.heads, kv.head_size), spec.dtype, spec.device)
        #: Keys and values (blocks, block tokens, heads, head size) of each layer in turn, at fixed addresses.
        self.tensors = list(self._whole.unbind())
        self.allocator = BlockAllocator(blocks, block_tokens)
        self.allocator.wipe = self._wipe

    def copy(self, copies: Sequence[CopiedBlock]) -> None:
        """Copy blocks' content to other blocks."""
        sources, targets = to_device(copies, self._device).unbind(dim=1)
        self._whole.index_copy_(1, targets, self._whole.index_select(1, sources))

    def _wipe(self, blocks: Sequence[int]) -> None:
        self._whole.index_fill_(1, to_device(list(blocks), self._device), 0)


class Carry:
    """A segment's carry: equal to another with the same memory, which it keeps alive."""

    def __init__(self, carry: Tensor) -> None:
        self._carry = carry

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Carry) and self._carry.data_ptr() == other._carry.data_ptr()

    def __hash__(self) -> int:
        return self._carry.data_ptr()


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """A prefix whose blocks are shared by reference."""

    blocks: tuple[int, ...]
    length: int
    carry: Tensor | None
    allocator: BlockAllocator
    #: Bytes of the tokens' keys and values and of the carry.
    nbytes: int

    def share(self) -> SharedPrefix:
        """The prefix for another holder, with references of its own."""
        self.allocator.share(self.blocks)
        return self

    def release(self) -> None:
        """Give the prefix up: blocks without other references are free."""
        # No logits were computed of a prefix, so nobody knows whether it holds NaN.
        self.allocator.spoil(self.allocator.release(self.blocks))


class BlockCache(KVCache):
    """Block tables over a pool, which several caches may share."""

    prefills_at_end = False

    def __init__(self, spec: CacheSpec, max_idle_positions: int, pool: BlockPool) -> None:
        super().__init__(spec, max_idle_positions)
        self.pool = pool
        self._tables = BlockTables(self.pool.allocator)
        #: The entries of the extra pools, by the address of a row's carry.
        self._entries = SharedEntries()
        #: (slots, width): the tables, padded with NULL_BLOCK.
        self._table = numpy.zeros((0, 0), numpy.int64)

    @property
    def block_tokens(self) -> int:
        """Number of tokens for which there are blocks."""
        return self.pool.allocator.count * self.pool.allocator.block_tokens

    @property
    def usage(self) -> float:
        """Share of the blocks that are in use, by rows or prefixes."""
        return self.pool.allocator.used / self.pool.allocator.count

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, in use or not."""
        return sum(tensor.nbytes for tensor in self.pool.tensors)

    def empty_like(self, max_idle_positions: int) -> BlockCache:
        """A cache of other rows on the same pool."""
        return BlockCache(self.spec, max_idle_positions, self.pool)

    def _fill(self, slots: Sequence[int], prefixes: Sequence[Prefix | None], tokens: Sequence[int], room: int) -> None:
        copies = []
        for slot, prefix, count in zip(slots, prefixes, tokens, strict=True):
            assert prefix is None or isinstance(prefix, SharedPrefix)
            blocks, length = (prefix.blocks, prefix.length) if prefix else ((), 0)
            copied = self._tables.begin(slot, blocks, length, count)
            copies += [copied] if copied else []
            self._show(slot)
        if copies:
            self.pool.copy(copies)

    def _fork(self, slot: int, slots: Sequence[int]) -> None:
        for target in slots:
            self._entries.share(slot, target)
        self._give([(slot, target) for target in slots])

    def copy(self, moves: Sequence[Move], start: int) -> None:
        """Share blocks with other slots, and copy those that are not full: see KVCache.copy."""
        for _, target in moves:
            self._tables.release(target)
        self._give(moves)

    def _give(self, moves: Sequence[Move]) -> None:
        """Give slots without blocks the tokens of others."""
        copies = []
        for source, target in moves:
            length = self.slots.lengths[source]
            copied = self._tables.begin(target, self._tables[source], length, length)
            copies += [copied] if copied else []
            self._show(target)
        if copies:
            self.pool.copy(copies)

    def reserve(self, tokens: Sequence[int]) -> None:
        """Take the blocks that rows of this many tokens need in addition. Raises OutOfBlocks."""
        for slot, count in enumerate(tokens):
            if count and self._tables.reserve(slot, count):
                self._show(slot)

    def begin(self, prompts: Sequence[PendingPrompt], tokens: Sequence[int], room: int, *, at_end: bool) -> list[int]:
        """Take slots for prompts: see KVCache.begin. Prompts with the same carry share what is computed from it."""
        slots = super().begin(prompts, tokens, room, at_end=at_end)
        for slot, prompt in zip(slots, prompts, strict=True):
            if prompt.segment.carry is not None:
                self._entries.take(slot, Carry(prompt.segment.carry))
        return slots

    @property
    def extra_numbers(self) -> list[int]:
        """The entry of each slot in the extra pools; 0 if it has none."""
        return [self._entries[slot] for slot in range(len(self.slots))]

    def extra_slots(self, slots: Sequence[int]) -> Sequence[int]:
        """The entries of these slots in the extra pools."""
        return [self._entries[slot] for slot in slots]

    def extra_views(self, rows: int) -> list[Tensor]:
        """Keys and values (entries, heads, width, head size) of each layer of each extra pool in turn."""
        return super().extra_views(bucket(len(self._entries)))

    def fitting(self, rows: Sequence[tuple[int, int]], spare_tokens: int = 0) -> int:
        """How many of these rows, the first ones, can begin: see KVCache.fitting."""
        allocator, needed = self.pool.allocator, self._width(spare_tokens)
        for count, (prefix, tokens) in enumerate(rows):
            needed += blocks_for(tokens, allocator.block_tokens) - prefix // allocator.block_tokens
            if not allocator.can_take(needed):
                return count
        return len(rows)

    def has_room(self, tokens: Sequence[int]) -> bool:
        """Whether `reserve` would succeed."""
        missing = sum(self._tables.missing(slot, count) for slot, count in enumerate(tokens) if count)
        return self.pool.allocator.can_take(missing)

    def blocks(self, slot: int) -> Sequence[int]:
        """The blocks of a slot, in the order of its tokens."""
        return self._tables[slot]

    def _show(self, slot: int) -> None:
        """Copy a slot's blocks to the table of all slots."""
        blocks = self._tables[slot]
        self._widen(slot + 1, len(blocks))
        self._table[slot, : len(blocks)] = blocks
        self._table[slot, len(blocks) :] = NULL_BLOCK

    def _widen(self, rows: int, width: int) -> None:
        held_rows, held_width = self._table.shape
        if rows > held_rows or width > held_width:
            # At least twice as large, so that tables that grow are rarely copied.
            size = [
                held if new <= held else max(new, 2 * held) for new, held in ((rows, held_rows), (width, held_width))
            ]
            wider = numpy.zeros(size, numpy.int64)
            wider[:held_rows, :held_width] = self._table
            self._table = wider

    def prompt_views(self, slots: Sequence[int], room: int, *, at_end: bool) -> list[Tensor]:
        """The table (prompts, width) of the slots, then the pool's tensors."""
        width = self._width(room)
        self._widen(max(slots) + 1, width)
        return [upload(torch.from_numpy(self._table[list(slots), :width]), self.spec.device), *self.pool.tensors]

    def views(self, rows: int, room: int) -> list[Tensor]:
        """The table (rows, width), then the pool's tensors."""
        width = self._width(room)
        self._widen(rows, width)
        return [upload(torch.from_numpy(self._table[:rows, :width]), self.spec.device), *self.pool.tensors]

    def _width(self, room: int) -> int:
        return blocks_for(room, self.pool.allocator.block_tokens)

    def rounded(self, room: int) -> int:
        """The positions of a table whose width is a power of two."""
        width = max(MIN_WIDTH, bucket(self._width(room)))
        return width * self.pool.allocator.block_tokens

    def keep_prefix(self, slot: int, carry: Tensor | None) -> SharedPrefix:
        """A slot's blocks as a prefix. `carry`: that of its tokens."""
        length = self.slots.lengths[slot]
        nbytes = length * self.position_bytes + (0 if carry is None else carry.nbytes)
        blocks = tuple(self._tables.first(slot, length))
        return SharedPrefix(blocks, length, carry, self.pool.allocator, nbytes)

    def spoil(self, slot: int) -> None:
        """Have a slot's blocks wiped before they are taken again."""
        super().spoil(self._entries[slot])
        self.pool.allocator.spoil(self._tables[slot])

    def release(self, slots: Sequence[int]) -> None:
        """Free slots and their blocks, which other rows and prefixes may hold, too."""
        for slot in slots:
            self._tables.release(slot)
            self._entries.release(slot)
            if slot < len(self._table):
                self._table[slot] = NULL_BLOCK
        super().release(slots)

    def _compact(self, moves: Sequence[Move], rows: int, views: Sequence[Tensor]) -> None:
        for source, target in moves:
            self._tables.move(source, target)
            self._entries.move(source, target)
            self._show(target)
            self._table[source] = NULL_BLOCK

    def reclaim_from(self, holder: BlockHolder) -> None:
        """Have the holder of prefixes give up blocks when blocks are short."""
        self.pool.allocator.holder = holder

    def metrics(self) -> dict[str, int]:
        """The number of blocks, of those in use, and of those with more than one holder."""
        allocator = self.pool.allocator
        return {"kv_blocks": allocator.count, "kv_blocks_used": allocator.used, "kv_blocks_shared": allocator.shared}

    def clear(self) -> None:
        """Free all slots and all blocks of the pool, after a failure. The pool's other caches must be cleared and its
        prefixes dropped, too."""
        super().clear()
        self._tables.clear()
        self._entries.clear()
        self._table[:] = NULL_BLOCK
        self.pool.allocator.clear()


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, for which a CPU's memory is used only when they are written to or read: torch.zeros writes them."""
    if device.type != "cpu":
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    elements = int(numpy.prod(shape))
    return torch.from_numpy(numpy.zeros(elements * dtype.itemsize, numpy.uint8)).view(dtype).view(tuple(shape))
