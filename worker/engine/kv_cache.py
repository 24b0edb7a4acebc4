"""The keys and values of a batch's rows, in preallocated slots that grow in steps.

`worker/engine/slots.py` says which slots are in use; `ContinuousModel` in `worker/engine/continuous.py` which row has
which slot.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from worker.engine.interfaces import CacheSpec, KVSpec, Prefix
from worker.engine.slots import Move
from worker.engine.tensors import to_device
from worker.engine.traced import Traced

#: Positions that a pool grows by: few enough to waste little memory, enough to make its copies rare.
GROWTH = 64


def grown(positions: int) -> int:
    """The next multiple of GROWTH."""
    return -(-positions // GROWTH) * GROWTH


class KVPool:
    """Keys and values (slots, heads, capacity, head size) of each layer in a group of layers."""

    def __init__(self, spec: KVSpec, dtype: torch.dtype, device: torch.device, max_idle_positions: int) -> None:
        """`max_idle_positions`: maximum unused positions that stay allocated, of all slots together."""
        self._spec = spec
        self._max_idle_positions = max_idle_positions
        self._empty = torch.zeros(0, spec.heads, 0, spec.head_size, dtype=dtype, device=device)
        #: Keys and values of each layer in turn.
        self.tensors: list[Tensor] = [self._empty] * (2 * spec.layers)

    @property
    def positions(self) -> int:
        """Allocated positions of all slots together, in use or not."""
        return self.tensors[0].shape[0] * self.tensors[0].shape[2]

    @property
    def position_bytes(self) -> int:
        """Bytes of one position's keys and values in all layers."""
        return 2 * self._spec.layers * self._spec.heads * self._spec.head_size * self._empty.element_size()

    def reserve(self, slots: int, capacity: int) -> None:
        """Make room for `slots` slots of `capacity` positions each, and keep their content."""
        held_slots, _, held_capacity, _ = self.tensors[0].shape
        if slots <= held_slots and capacity <= held_capacity:
            return
        rows, room = max(slots, held_slots), grown(max(capacity, held_capacity))
        if rows * room > self._max_idle_positions:
            # The most rows and the longest row may have occurred at different times: shrink to the present need.
            rows, room = slots, grown(capacity)
        for index, tensor in enumerate(self.tensors):
            # One after the other, so that only one tensor exists twice at a time.
            self.tensors[index] = self._resized(tensor, rows, room)

    def _resized(self, old: Tensor, rows: int, room: int) -> Tensor:
        """A copy of `old` (slots, heads, capacity, head size) as (rows, heads, room, head size), cut or zero-filled."""
        new = old.new_zeros(rows, old.shape[1], room, old.shape[3])
        both = new[: old.shape[0], :, : old.shape[2]]
        both.copy_(old[: both.shape[0], :, : both.shape[2]])
        return new

    def views(self, slots: int, length: int) -> list[Tensor]:
        """Keys and values (slots, heads, length, head size) of each layer in turn: the first slots and positions."""
        return [tensor[:slots, :, :length] for tensor in self.tensors]

    def zero_slot(self, slot: int) -> None:
        """Overwrite a slot's keys and values with zeros."""
        for tensor in self.tensors:
            tensor[slot : slot + 1].zero_()

    def shrink(self) -> None:
        """Free the memory if it has more than `max_idle_positions` positions. For a pool without rows."""
        if self.positions > self._max_idle_positions:
            self.clear()

    def clear(self) -> None:
        """Free the memory."""
        self.tensors = [self._empty] * len(self.tensors)


class SlotCache:
    """A decoder's caches: a pool for the keys and values of the tokens, and the family's extra pools of fixed width."""

    def __init__(self, spec: CacheSpec, max_idle_positions: int) -> None:
        """`max_idle_positions`: see KVPool; it holds for each pool."""
        self._spec = spec
        self._move = Traced(move)
        self._restore = Traced(restore)
        self._allocate(max_idle_positions)

    def _allocate(self, max_idle_positions: int) -> None:
        spec = self._spec
        self.self_kv = KVPool(spec.self_kv, spec.dtype, spec.device, max_idle_positions)
        self.extra = [KVPool(extra, spec.dtype, spec.device, max_idle_positions) for extra in spec.extra]

    @property
    def _pools(self) -> list[KVPool]:
        return [self.self_kv, *self.extra]

    @property
    def position_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return self.self_kv.position_bytes

    def empty_like(self, max_idle_positions: int) -> SlotCache:
        """An empty cache of the same shape."""
        other = copy.copy(self)
        other._allocate(max_idle_positions)
        return other

    def self_views(self, slots: int, length: int, longest: int) -> list[Tensor]:
        """Keys and values (slots, heads, length, head size) of each layer in turn, with room for rows of `longest`
        tokens."""
        self.self_kv.reserve(slots, max(length, longest))
        return self.self_kv.views(slots, length)

    def extra_views(self, slots: int) -> list[Tensor]:
        """Keys and values (slots, heads, width, head size) of each layer of each extra pool in turn."""
        views: list[Tensor] = []
        for pool, spec in zip(self.extra, self._spec.extra, strict=True):
            pool.reserve(slots, spec.width)
            views += pool.views(slots, spec.width)
        return views

    def zero_slot(self, slot: int) -> None:
        """Overwrite a slot's content with zeros. NaN would spoil sums even where it is masked."""
        for pool in self._pools:
            pool.zero_slot(slot)

    def compact(self, moves: Sequence[Move], views: Sequence[Tensor]) -> None:
        """Copy slots' content to other slots in `views` of this cache, each (slots, heads, positions, head size)."""
        sources, targets = to_device(moves, self._spec.device).unbind(dim=1)
        self._move(sources, targets, *views)

    def restore_prefix(self, prefix: Prefix, slots: Sequence[int]) -> None:
        """Copy a prefix into slots, which must have room for it."""
        places = to_device(list(slots), self._spec.device)
        self._restore(places, *self.self_kv.tensors, *prefix.tensors)

    def copy_prefix(self, slot: int, length: int, carry: Tensor | None) -> Prefix:
        """Copy a slot's first `length` positions. `carry`: that of the copied tokens."""
        return Prefix(tuple(tensor[slot, :, :length].clone() for tensor in self.self_kv.tensors), carry)

    def shrink(self) -> None:
        """Free the memory of each pool with more than `max_idle_positions` positions. For a cache without rows."""
        for pool in self._pools:
            pool.shrink()

    def clear(self) -> None:
        """Free the memory."""
        for pool in self._pools:
            pool.clear()


def move(sources: Tensor, targets: Tensor, *tensors: Tensor) -> Tensor:
    """In each of `tensors` (slots, ...), copy the slots `sources` (moves,) to the slots `targets` (moves,).

    Returns `targets`, since a traced function must return a tensor.
    """
    for tensor in tensors:
        tensor.index_copy_(0, targets, tensor.index_select(0, sources))
    return targets


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
