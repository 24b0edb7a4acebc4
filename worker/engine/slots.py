"""The slots of a batch's caches that are in use: bookkeeping without tensors."""

from __future__ import annotations

from collections.abc import Sequence

#: Compaction starts when more than one in GAPS_PART slots is free before the last one in use. In a step a free slot
#: costs as much as a row; moving a row costs more than that, and new rows mostly fill the gaps.
GAPS_PART = 4

#: Source slot, target slot.
Move = tuple[int, int]


class SlotTable:
    """The rows of a batch by slot, up to the last slot in use. A slot is free if its length is 0.

    Each kv_cache.KVCache has one table.
    """

    def __init__(self) -> None:
        #: By slot: number of tokens whose keys and values it holds.
        self.lengths: list[int] = []
        #: By slot: whether the row has content in the extra pools (see interfaces.CacheSpec).
        self.has_extra: list[bool] = []

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest row; 0 without rows."""
        return max(self.lengths, default=0)

    @property
    def gaps(self) -> list[int]:
        """The free slots before the last one in use."""
        return [slot for slot, length in enumerate(self.lengths) if not length]

    def take(self, lengths: Sequence[int], has_extra: Sequence[bool], *, at_end: bool) -> list[int]:
        """Put rows into free slots and return the slots in the rows' order. `at_end`: use no gaps."""
        gaps = [] if at_end else self.gaps[: len(lengths)]
        new = len(lengths) - len(gaps)
        slots = [*gaps, *range(len(self), len(self) + new)]
        self.lengths += [0] * new
        self.has_extra += [False] * new
        for slot, length, extra in zip(slots, lengths, has_extra, strict=True):
            self.lengths[slot], self.has_extra[slot] = length, extra
        return slots

    def advance(self) -> None:
        """Record one more token for each row."""
        self.lengths = [length and length + 1 for length in self.lengths]

    def release(self, slots: Sequence[int]) -> None:
        """Free slots."""
        for slot in slots:
            self.lengths[slot], self.has_extra[slot] = 0, False
        while self.lengths and not self.lengths[-1]:
            self.lengths.pop()
            self.has_extra.pop()

    def compact(self) -> list[Move]:
        """If many slots are free, move the last rows into gaps. The caller makes the same moves in the caches.

        No slot is the source of one move and the target of another.
        """
        gaps = self.gaps
        if len(gaps) * GAPS_PART <= len(self):
            return []
        left = len(self) - len(gaps)
        sources = [slot for slot in range(left, len(self)) if self.lengths[slot]]
        moves = list(zip(sources, gaps, strict=False))
        for source, target in moves:
            self.lengths[target], self.has_extra[target] = self.lengths[source], self.has_extra[source]
        del self.lengths[left:], self.has_extra[left:]
        return moves

    def clear(self) -> None:
        """Free all slots."""
        self.lengths.clear()
        self.has_extra.clear()
