"""The blocks of keys and values that a batch's rows hold: bookkeeping without tensors.

A block has room for a fixed number of tokens. A row's block table lists its blocks in order, so a row costs what it is
long, and rows can share the blocks of a common prefix (Kwon et al., "PagedAttention", 2023).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

#: Tokens of a block: few, since on average half a block of each row is empty.
BLOCK_TOKENS = 16
#: Pads block tables. This block is never taken and always holds zeros.
NULL_BLOCK = 0


class OutOfBlocks(MemoryError):
    """Fewer blocks are free than are needed."""


class BlockHolder(Protocol):
    """Holds blocks that it can give up, such as cached prefixes."""

    def blocks(self) -> Iterable[int]:
        """Its blocks, each once for each of its references."""

    def evict(self) -> bool:
        """Give up some of its references. Returns False if it had none."""


class CopiedBlock(NamedTuple):
    """A block whose content the caller must copy to another block."""

    source: int
    target: int


def blocks_for(tokens: int, block_tokens: int = BLOCK_TOKENS) -> int:
    """Number of blocks that hold this many tokens."""
    return -(-tokens // block_tokens)


class BlockAllocator:
    """Free blocks, and the number of references to each block in use. A block without references is free."""

    def __init__(self, count: int, block_tokens: int = BLOCK_TOKENS) -> None:
        """`count`: blocks that can be taken, numbered from 1. `block_tokens`: tokens of a block."""
        self.count = count
        self.block_tokens = block_tokens
        #: Gives up blocks when blocks are short.
        self.holder: BlockHolder | None = None
        #: Called with blocks that must be overwritten with zeros before they are used again.
        self.wipe: Callable[[Sequence[int]], None] = lambda blocks: None
        self._spoiled: set[int] = set()
        self._free_all()

    def _free_all(self) -> None:
        # The block released last is taken first, so that memory that was never used is touched last.
        self._free = list(range(self.count, 0, -1))
        self._references = [0] * (self.count + 1)
        self._shared = 0

    @property
    def free(self) -> int:
        """Number of free blocks."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Number of blocks with references."""
        return self.count - len(self._free)

    @property
    def shared(self) -> int:
        """Number of blocks with more than one reference."""
        return self._shared

    def references(self, block: int) -> int:
        """Number of references to a block."""
        return self._references[block]

    def can_take(self, count: int) -> bool:
        """Whether this many blocks are free, or would be if the holder gave up all of its own."""
        if count <= self.free or self.holder is None:
            return count <= self.free
        held = Counter(self.holder.blocks())
        return count <= self.free + sum(self._references[block] == number for block, number in held.items())

    def take(self, count: int) -> list[int]:
        """Take free blocks, each with one reference. Raises OutOfBlocks, and takes none then."""
        if not self.can_take(count):
            raise OutOfBlocks
        while count > self.free and self.holder and self.holder.evict():
            pass
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        spoiled = self._spoiled.intersection(taken)
        if spoiled:
            self._spoiled -= spoiled
            self.wipe(sorted(spoiled))
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """Add a reference to each of some blocks in use."""
        for block in blocks:
            assert self._references[block], "a free block cannot be shared"
            self._shared += self._references[block] == 1
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> list[int]:
        """Remove a reference to each of some blocks in use. Returns those that are free now."""
        freed = []
        for block in blocks:
            assert self._references[block], "a block was released twice"
            self._references[block] -= 1
            self._shared -= self._references[block] == 1
            if not self._references[block]:
                freed.append(block)
        self._free += freed
        return freed

    def spoil(self, blocks: Sequence[int]) -> None:
        """Have blocks wiped before they are taken again: they may hold NaN."""
        self._spoiled.update(blocks)

    def clear(self) -> None:
        """Free all blocks, after a failure: any of them may hold NaN."""
        self._free_all()
        self.spoil(self._free)


class BlockTables:
    """The blocks of each row of a batch, by slot."""

    def __init__(self, allocator: BlockAllocator) -> None:
        """`allocator`: may be shared with other tables."""
        self._allocator = allocator
        self._blocks: dict[int, list[int]] = {}

    def __getitem__(self, slot: int) -> Sequence[int]:
        """The blocks of a slot, in the order of its tokens."""
        return self._blocks.get(slot, ())

    def begin(self, slot: int, prefix: Sequence[int], prefix_tokens: int, tokens: int) -> CopiedBlock | None:
        """Give a free slot a prefix's blocks, and blocks for `tokens` tokens, those of the prefix included.

        The full blocks of the prefix are shared. Its last block is copied if it is not full, since the row writes into
        it: the caller must make the copy that is returned. Raises OutOfBlocks, and gives none then.
        """
        size = self._allocator.block_tokens
        assert slot not in self._blocks, "the slot is in use"
        full = prefix[: prefix_tokens // size]
        # The references come first: to take blocks may evict the prefix.
        self._allocator.share(prefix)
        try:
            own = self._allocator.take(blocks_for(tokens, size) - len(full))
        except OutOfBlocks:
            self._allocator.release(prefix)
            raise
        self._blocks[slot] = [*full, *own]
        partial = prefix[len(full) :]
        self._allocator.release(partial)
        return CopiedBlock(partial[0], own[0]) if partial else None

    def missing(self, slot: int, tokens: int) -> int:
        """Number of blocks that a slot needs in addition for `tokens` tokens."""
        return max(0, blocks_for(tokens, self._allocator.block_tokens) - len(self[slot]))

    def reserve(self, slot: int, tokens: int) -> bool:
        """Give a slot blocks for `tokens` tokens. Returns whether it got new ones. Raises OutOfBlocks."""
        missing = self.missing(slot, tokens)
        if missing:
            self._blocks[slot] += self._allocator.take(missing)
        return bool(missing)

    def first(self, slot: int, tokens: int) -> list[int]:
        """The blocks of a slot's first tokens, with one more reference each, which the caller must release."""
        blocks = list(self[slot][: blocks_for(tokens, self._allocator.block_tokens)])
        self._allocator.share(blocks)
        return blocks

    def move(self, source: int, target: int) -> None:
        """Give a free slot all blocks of another."""
        assert target not in self._blocks, "the slot is in use"
        self._blocks[target] = self._blocks.pop(source)

    def release(self, slot: int) -> None:
        """Free a slot."""
        self._allocator.release(self._blocks.pop(slot, ()))

    def clear(self) -> None:
        """Forget all slots, without releasing their blocks: for an allocator that is cleared."""
        self._blocks.clear()
