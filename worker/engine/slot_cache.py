"""Keys and values in slots of equal length, which grow in steps and are read where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from worker.engine.blocks import BlockHolder
from worker.engine.interfaces import CacheSpec, Prefix
from worker.engine.kv_cache import KVCache, KVPool, grown
from worker.engine.slots import Move
from worker.engine.tensors import to_device
from worker.engine.traced import Traced


@dataclass(frozen=True, slots=True)
class CopiedPrefix:
    """A prefix whose keys and values were copied out of a slot, and are copied into each slot that begins with it."""

    #: Keys and values (heads, length, head size) of each layer in turn.
    tensors: tuple[Tensor, ...]
    carry: Tensor | None

    @property
    def length(self) -> int:
        """Number of tokens."""
        return int(self.tensors[0].shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the keys, values and carry."""
        return sum(tensor.nbytes for tensor in self.tensors) + (0 if self.carry is None else self.carry.nbytes)

    @property
    def blocks(self) -> Sequence[int]:
        """None."""
        return ()

    def share(self) -> Self:
        """The prefix for another holder."""
        return self

    def release(self) -> None:
        """Give the prefix up: its memory is free when no holder is left."""


class SlotCache(KVCache):
    """Keys and values (slots, heads, positions, head size) of each layer in turn."""

    # Views of adjacent slots need no copy.
    prefills_at_end = True

    def __init__(self, spec: CacheSpec, max_idle_positions: int) -> None:
        super().__init__(spec, max_idle_positions)
        self._pool = KVPool(spec.self_kv, spec.dtype, spec.device, max_idle_positions)
        self._restore = Traced(restore)

    @property
    def positions(self) -> int:
        """Allocated positions of all slots together, in use or not."""
        return self._pool.positions

    @property
    def tensors(self) -> list[Tensor]:
        """Keys and values (slots, heads, capacity, head size) of each layer in turn."""
        return self._pool.tensors

    @property
    def block_tokens(self) -> int:
        """0: slots grow."""
        return 0

    @property
    def usage(self) -> float:
        """Share of the allocated positions that hold tokens."""
        return sum(self.slots.lengths) / (self.positions or 1)

    @property
    def nbytes(self) -> int:
        """Allocated bytes of all slots together, in use or not."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def empty_like(self, max_idle_positions: int) -> SlotCache:
        """An empty cache of the same shape, with memory of its own."""
        return SlotCache(self.spec, max_idle_positions)

    def _fill(self, slots: Sequence[int], prefixes: Sequence[Prefix | None], tokens: Sequence[int], room: int) -> None:
        self._pool.reserve(len(self.slots), max(room, self.slots.longest))
        # Each distinct prefix in one call.
        places: dict[int, list[int]] = {}
        distinct = {id(prefix): prefix for prefix in prefixes if prefix}
        for slot, prefix in zip(slots, prefixes, strict=True):
            places.setdefault(id(prefix), []).append(slot)
        for key, prefix in distinct.items():
            assert isinstance(prefix, CopiedPrefix)
            self._restore(to_device(places[key], self.spec.device), *self._pool.tensors, *prefix.tensors)

    def _fork(self, slot: int, slots: Sequence[int]) -> None:
        rows, has_extra = len(self.slots), self.slots.has_extra[slot]
        extra = self.extra_views(rows) if has_extra else []
        moves = [(slot, target) for target in slots]
        super()._compact(moves, rows, [*self.views(rows, self.slots.lengths[slot]), *extra])

    def copy(self, moves: Sequence[Move], start: int) -> None:
        """Copy tokens to other slots: see KVCache.copy."""
        length = max(self.slots.lengths[source] for source, _ in moves)
        rows = len(self.slots)
        super()._compact(moves, rows, [view[:, :, start:] for view in self.views(rows, length)])

    def fitting(self, rows: Sequence[tuple[int, int]], spare_tokens: int = 0) -> int:
        """All: slots grow until the device's memory is full."""
        return len(rows)

    def has_room(self, tokens: Sequence[int]) -> bool:
        """True: the views make room for their positions."""
        return True

    def reserve(self, tokens: Sequence[int]) -> None:
        """Nothing: the views make room for their positions."""

    def prompt_views(self, slots: Sequence[int], room: int, *, at_end: bool) -> list[Tensor]:
        """Keys and values, each (slots, heads, room, head size)."""
        views = self.views(len(self.slots), room)
        return [view[slots[0] :] for view in views] if at_end else views

    def views(self, rows: int, room: int) -> list[Tensor]:
        """Keys and values, each (rows, heads, room, head size)."""
        self._pool.reserve(rows, max(room, self.slots.longest))
        return self._pool.views(rows, room)

    def rounded(self, room: int) -> int:
        """The capacity that the slots grow to for this many positions."""
        return grown(room)

    def keep_prefix(self, slot: int, carry: Tensor | None) -> CopiedPrefix:
        """A copy of a slot's tokens. `carry`: that of these tokens."""
        length = self.slots.lengths[slot]
        return CopiedPrefix(tuple(tensor[slot, :, :length].clone() for tensor in self._pool.tensors), carry)

    def spoil(self, slot: int) -> None:
        """Overwrite a slot's content with zeros."""
        super().spoil(slot)
        self._pool.zero_slot(slot)

    def _shrink(self) -> None:
        super()._shrink()
        self._pool.shrink()

    def _compact(self, moves: Sequence[Move], rows: int, views: Sequence[Tensor]) -> None:
        super()._compact(moves, rows, [*self.views(rows, self.slots.longest), *views])

    def reclaim_from(self, holder: BlockHolder) -> None:
        """Nothing: prefixes have memory of their own."""

    def metrics(self) -> dict[str, int]:
        """None."""
        return {}

    def clear(self) -> None:
        """Free all slots and their memory, after a failure."""
        super().clear()
        self._pool.clear()


def restore(slots: Tensor, *tensors: Tensor) -> Tensor:
    """Copy one prefix into `slots` (any,) and return `slots`.

    The first half of `tensors` are caches (slots, heads, positions, head size), the second half the prefix's content
    for each of them (heads, length, head size).
    """
    half = len(tensors) // 2
    for cache, prefix in zip(tensors[:half], tensors[half:], strict=True):
        whole = prefix.expand(slots.shape[0], *prefix.shape)
        cache[:, :, : prefix.shape[1]].index_copy_(0, slots, whole)
    return slots
