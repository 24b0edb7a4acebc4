"""The keys and values of a batch's rows, in one of two layouts.

In slots (`slot_cache.py`) each row has as much room as the longest one: attention reads keys and values where they are.
In blocks (`block_cache.py`) a row costs what it is long, and rows share the blocks of common prefixes. Which slots are
in use says `slots.py`, which row has which slot `ContinuousModel` in `continuous.py`.
"""

from __future__ import annotations

import abc
import weakref
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from worker.engine.blocks import BlockHolder, OutOfBlocks
from worker.engine.interfaces import CacheSpec, KVSpec, PendingPrompt, Prefix
from worker.engine.slots import Move, SlotTable
from worker.engine.tensors import to_device
from worker.engine.traced import Traced
from worker.observability.metrics import KV_BYTES, KV_USAGE

#: Positions that a pool of slots grows by: few enough to waste little memory, enough to make its copies rare.
GROWTH = 64


class KVCache(abc.ABC):
    """A decoder's caches, by slot: the keys and values of the tokens, and the family's extra pools of fixed width.

    Views are lists of tensors in the form that interfaces.Decoder describes.
    """

    #: Whether prompts that are prefilled without the extra pools must be in the last slots, in order.
    prefills_at_end: ClassVar[bool]

    def __init__(self, spec: CacheSpec, max_idle_positions: int) -> None:
        """`max_idle_positions`: see KVPool; it holds for each pool."""
        self.slots = SlotTable()
        self.spec = spec
        self._extra = [KVPool(extra, spec.dtype, spec.device, max_idle_positions) for extra in spec.extra]
        self._move = Traced(move)

    @property
    def position_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return self.spec.self_kv.position_bytes(self.spec.dtype)

    @property
    @abc.abstractmethod
    def block_tokens(self) -> int:
        """Number of tokens for which there are blocks; 0 in slots, which grow."""

    @property
    @abc.abstractmethod
    def usage(self) -> float:
        """Share of the room for tokens that is in use, 0 to 1."""

    @property
    @abc.abstractmethod
    def nbytes(self) -> int:
        """Allocated bytes of the tokens' keys and values."""

    @abc.abstractmethod
    def empty_like(self, max_idle_positions: int) -> KVCache:
        """An empty cache of the same shape, for other rows."""

    def begin(self, prompts: Sequence[PendingPrompt], tokens: Sequence[int], room: int, *, at_end: bool) -> list[int]:
        """Take slots for prompts, put their prefixes there, and make room for `tokens` tokens in each, those of the
        prefix included. Returns the slots in the prompts' order.

        `room`: number of positions of the views that will show these slots. `at_end`: take the last slots in order.
        Raises OutOfBlocks, and takes none then.
        """
        lengths = [prompt.end for prompt in prompts]
        has_extra = [prompt.segment.carry is not None for prompt in prompts]
        slots = self.slots.take(lengths, has_extra, at_end=at_end and self.prefills_at_end)
        try:
            self._fill(slots, [prompt.prefix for prompt in prompts], tokens, room)
        except OutOfBlocks:
            self.release(slots)
            raise
        return slots

    @abc.abstractmethod
    def _fill(self, slots: Sequence[int], prefixes: Sequence[Prefix | None], tokens: Sequence[int], room: int) -> None:
        """Put prefixes into slots that were taken, and make room for `tokens` tokens in each."""

    def fork(self, slot: int, count: int) -> list[int]:
        """Take `count` more slots with the content of a slot. Raises OutOfBlocks, and takes none then."""
        length, has_extra = self.slots.lengths[slot], self.slots.has_extra[slot]
        slots = self.slots.take([length] * count, [has_extra] * count, at_end=False)
        try:
            self._fork(slot, slots)
        except OutOfBlocks:
            self.release(slots)
            raise
        return slots

    @abc.abstractmethod
    def _fork(self, slot: int, slots: Sequence[int]) -> None:
        """Put a slot's content into slots that were taken."""

    @abc.abstractmethod
    def copy(self, moves: Sequence[Move], start: int) -> None:
        """Put the tokens of slots into others, without those of the extra pools and without the first `start` tokens:
        these are the same. No slot may be the source of one move and the target of another."""

    @abc.abstractmethod
    def fitting(self, rows: Sequence[tuple[int, int]], spare_tokens: int = 0) -> int:
        """How many of these rows, the first ones, can begin so that room for `spare_tokens` is left. Each row has the
        number of tokens of its prefix, and that of all tokens to make room for."""

    @abc.abstractmethod
    def has_room(self, tokens: Sequence[int]) -> bool:
        """Whether `reserve` would succeed."""

    @abc.abstractmethod
    def reserve(self, tokens: Sequence[int]) -> None:
        """Make room for this many tokens in each slot; 0 for a free one. Raises OutOfBlocks."""

    @abc.abstractmethod
    def prompt_views(self, slots: Sequence[int], room: int, *, at_end: bool) -> list[Tensor]:
        """Keys and values of prompts in `slots`, with `room` positions.

        `at_end`: prompt n is row n of the views; otherwise, in a layout of slots, its row is its slot.
        """

    @abc.abstractmethod
    def views(self, rows: int, room: int) -> list[Tensor]:
        """Keys and values of the first `rows` slots, with `room` positions."""

    @property
    def extra_numbers(self) -> list[int]:
        """For each slot 0 if it has no content in the extra pools, otherwise another number: in blocks its entry."""
        return [int(has_extra) for has_extra in self.slots.has_extra]

    def extra_slots(self, slots: Sequence[int]) -> Sequence[int]:
        """Where in the extra pools the content of these slots is."""
        return slots

    def extra_views(self, rows: int) -> list[Tensor]:
        """Keys and values (slots, heads, width, head size) of each layer of each extra pool in turn, of `rows` rows."""
        views: list[Tensor] = []
        for pool, spec in zip(self._extra, self.spec.extra, strict=True):
            pool.reserve(rows, spec.width)
            views += pool.views(rows, spec.width)
        return views

    @abc.abstractmethod
    def rounded(self, room: int) -> int:
        """A number of positions rounded up, so that there are few shapes."""

    @abc.abstractmethod
    def keep_prefix(self, slot: int, carry: Tensor | None) -> Prefix:
        """The tokens of a slot as a prefix, which stays when the slot is released. `carry`: that of these tokens."""

    def spoil(self, slot: int) -> None:
        """Have a slot's content overwritten with zeros before it is used again. NaN spoils sums even where it is
        masked."""
        for pool in self._extra:
            pool.zero_slot(slot)

    def release(self, slots: Sequence[int]) -> None:
        """Free slots. Once none is in use, also free memory beyond `max_idle_positions`."""
        self.slots.release(slots)
        if not len(self.slots):
            self._shrink()

    def _shrink(self) -> None:
        for pool in self._extra:
            pool.shrink()

    def compact(self) -> list[Move]:
        """Move the last rows to free slots if many slots are free. Returns the moves."""
        rows, has_extra = len(self.slots), any(self.slots.has_extra)
        moves = self.slots.compact()
        if moves:
            self._compact(moves, rows, self.extra_views(rows) if has_extra else [])
        return moves

    def _compact(self, moves: Sequence[Move], rows: int, views: Sequence[Tensor]) -> None:
        """Make moves among the first `rows` slots. `views`: tensors (slots, ...) to move the content in."""
        if views:
            sources, targets = to_device(moves, self.spec.device).unbind(dim=1)
            self._move(sources, targets, *views)

    @abc.abstractmethod
    def reclaim_from(self, holder: BlockHolder) -> None:
        """Have the holder of prefixes give up blocks when blocks are short."""

    @abc.abstractmethod
    def metrics(self) -> dict[str, int]:
        """The number of blocks, of those in use, and of those with more than one holder."""

    def clear(self) -> None:
        """Free all slots and their memory, after a failure."""
        self.slots.clear()
        for pool in self._extra:
            pool.clear()


def watch(cache: KVCache) -> None:
    """Have the metrics of keys and values read this cache whenever they are collected. They do not keep it alive: a
    model may be loaded twice to measure its memory."""
    known = weakref.ref(cache)
    KV_USAGE.set_function(lambda: held.usage if (held := known()) else 0.0)
    KV_BYTES.set_function(lambda: held.nbytes if (held := known()) else 0)


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


def move(sources: Tensor, targets: Tensor, *tensors: Tensor) -> Tensor:
    """In each of `tensors` (slots, ...), copy the slots `sources` (moves,) to the slots `targets` (moves,).

    Returns `targets`, since a traced function must return a tensor.
    """
    for tensor in tensors:
        tensor.index_copy_(0, targets, tensor.index_select(0, sources))
    return targets
