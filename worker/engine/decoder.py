"""A family's decoder with a cache of slots, so that rows can join and leave a batch at any step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from worker.engine.block_cache import BlockCache, BlockPool
from worker.engine.cuda_graphs import Graphed, Step, bucket
from worker.engine.interfaces import CacheSpec, Decoder, PendingPrompt, Prefix
from worker.engine.kv_cache import KVCache, watch
from worker.engine.row import Tokens
from worker.engine.scoring import Continuations, TokenTree, by_sequence
from worker.engine.slot_cache import SlotCache
from worker.engine.slots import Move, SlotTable
from worker.engine.step_metrics import count_step, phase
from worker.engine.tensors import to_device
from worker.engine.traced import Traced
from worker.observability.metrics import STEP_TOKENS


class SlotDecoder:
    """Prefills prompts into slots, appends one token to every slot per step, and scores continuations of slots."""

    def __init__(
        self,
        decoder: Decoder,
        max_idle_positions: int = 2**16,
        record: Callable[[Step], Step] | None = None,
        blocks: int = 0,
    ) -> None:
        """`max_idle_positions`: see kv_cache.KVPool.

        `record`: see cuda_graphs.Graphed; None runs steps without recording. `blocks`: number of blocks of keys and
        values; 0 keeps them in slots.
        """
        self.cache = new_cache(decoder.spec, max_idle_positions, blocks)
        watch(self.cache)
        self.family = decoder
        self._device = decoder.spec.device
        self._step = Traced(decoder.step)
        self._graphed = Graphed(decoder.step, record) if record else None
        self._branch = Traced(decoder.branch)

    @property
    def slots(self) -> SlotTable:
        """The slots in use."""
        return self.cache.slots

    def empty_like(self, max_idle_positions: int) -> SlotDecoder:
        """The same decoder with an empty cache of its own, on the same blocks if there are any. `max_idle_positions`:
        see kv_cache.KVPool."""
        other = copy.copy(self)
        other.cache = self.cache.empty_like(max_idle_positions)
        return other

    def pending(self, tokens: Tokens, prefix: Prefix | None, features: Mapping[bytes, Tensor]) -> PendingPrompt:
        """A pending prompt of the tokens after a prefix. `features`: those of their pictures, by key, in any shape.

        It is the prefix's holder now: it must be prefilled or released.
        """
        return PendingPrompt(self.family.segment(tokens, features, prefix.carry if prefix else None), prefix)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[PendingPrompt]) -> tuple[Sequence[int], Tensor]:
        """Prefill prompts into free slots, and release their prefixes.

        Returns the slots in the prompts' order, and the logits (prompts, vocabulary) of the next tokens.
        """
        segments = [prompt.segment for prompt in prompts]
        starts = [prompt.start for prompt in prompts]
        is_plain = all(segment.carry is None for segment in segments)
        room = max(starts) + max(len(segment.ids) for segment in segments)
        slots = self._begin(prompts, [prompt.end for prompt in prompts], room, at_end=is_plain)
        self_kv = self.cache.prompt_views(slots, room, at_end=is_plain)
        if is_plain:
            return slots, self.family.prefill(segments, starts, range(len(slots)), self_kv, ())
        extra = self.cache.extra_views(len(self.slots))
        return slots, self.family.prefill(segments, starts, self.cache.extra_slots(slots), self_kv, extra)

    @phase("prefill")
    @torch.inference_mode()
    def prefill_prefixes(self, prompts: Sequence[PendingPrompt]) -> list[Prefix]:
        """Prefill the beginnings of prompts, keep them as prefixes, and free their slots."""
        slots, _ = self.prefill(prompts)
        kept = [self.cache.keep_prefix(slot, prompt.segment.carry) for slot, prompt in zip(slots, prompts, strict=True)]
        self.release(slots)
        return kept

    @phase("score")
    @torch.inference_mode()
    def prefill_scored(
        self,
        prompts: Sequence[PendingPrompt],
        firsts: Sequence[Sequence[int]],
        continuations: Continuations,
        most_tokens: Sequence[int],
    ) -> tuple[Sequence[int], list[list[float]], list[list[list[float]]]]:
        """Prefill prompts, and score continuations in the same forward. No slot may be in use.

        `most_tokens`: the number of tokens that each slot needs room for, of its prompt and of continuations that are
        scored together. Returns the prompts' slots; for each prompt, the log-probabilities of its `firsts` as the next
        token; and what `score_continuations` returns.
        """
        assert not len(self.slots), "a slot is in use"
        segments = [prompt.segment for prompt in prompts]
        starts = [prompt.start for prompt in prompts]
        tree = TokenTree.build([segment.ids for segment in segments], continuations, self._device)
        assert tree, "a prompt has tokens"
        room = max(starts) + tree.ids.shape[1]
        slots = self._begin(prompts, most_tokens, room, at_end=True)
        self_kv = self.cache.prompt_views(slots, room, at_end=True)
        has_extra = any(segment.carry is not None for segment in segments)
        extra = self.cache.extra_views(len(slots)) if has_extra else []
        rows = self.cache.extra_slots(slots)
        scores = self.family.prefill_scored(segments, starts, rows, tree, firsts, self_kv, extra).tolist()
        behind = max(map(len, firsts))
        return (
            slots,
            [row[: len(asked)] for row, asked in zip(scores, firsts, strict=True)],
            [by_sequence(row[behind:], sequences) for row, sequences in zip(scores, continuations, strict=True)],
        )

    def has_room(self) -> bool:
        """Whether each slot has room for one more token."""
        return self.cache.has_room(self._next_lengths())

    def _next_lengths(self) -> list[int]:
        return [length and length + 1 for length in self.slots.lengths]

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each slot and return the logits (slots, vocabulary) of the next. Free slots take any."""
        rows, room = len(self.slots), self.slots.longest + 1
        if self._graphed:
            # Rounded up, so that few shapes are recorded; the additional rows are free slots.
            rows, room = bucket(rows), self.cache.rounded(room)
        self.cache.reserve(self._next_lengths())
        free = [0] * (rows - len(self.slots))
        # One tensor, since making each one releases and reacquires the interpreter lock.
        numbers = self._tensor([[*tokens, *free], [*self.slots.lengths, *free], [*self.cache.extra_numbers, *free]])
        self_kv, extra = self._views(rows, room)
        step = self._graphed or self._step
        logits = step(numbers, self_kv=self_kv, extra=extra)
        count_step(len(self.slots) - self.slots.lengths.count(0))
        self.slots.advance()
        return logits[: len(self.slots)]

    @phase("score")
    @torch.inference_mode()
    def score_continuations(self, continuations: Continuations) -> list[list[list[float]]]:
        """Log-probabilities of continuations of each slot, which must have room for them. The slots' content is not
        changed.

        `continuations[slot]` are token sequences, each of which follows the slot's prompt. The result has, for each
        sequence, a number for each token except the first, whose probability the prompt's prefill gave.
        """
        tree = TokenTree.build([()] * len(continuations), continuations, self._device)
        if tree is None:
            return [[[] for _ in sequences] for sequences in continuations]
        starts, has_extra = self._tensor([self.slots.lengths, self.cache.extra_numbers]).unbind()
        self_kv, extra = self._views(len(self.slots), self.slots.longest + tree.ids.shape[1])
        inputs = tree.ids, starts, tree.targets, tree.owner, tree.depth, has_extra
        scores = self._branch(*inputs, self_kv=self_kv, extra=extra).tolist()
        return [by_sequence(row, sequences) for row, sequences in zip(scores, continuations, strict=True)]

    def release(self, slots: Sequence[int]) -> None:
        """Free slots. Once none is in use, also free memory beyond `max_idle_positions`."""
        self.cache.release(slots)

    @torch.inference_mode()
    def fork(self, slot: int, count: int) -> list[int]:
        """Take `count` more slots with the content of a slot. Raises OutOfBlocks, and takes none then."""
        return self.cache.fork(slot, count)

    @torch.inference_mode()
    def copy(self, moves: Sequence[Move], start: int) -> None:
        """Put the tokens of slots into others that have the same first `start` tokens: see KVCache.copy."""
        self.cache.copy(moves, start)

    @torch.inference_mode()
    def compact(self) -> list[Move]:
        """Move the last rows to free slots if many slots are free. Returns the moves."""
        return self.cache.compact()

    def clear(self) -> None:
        """Free all slots and their memory, after a failure."""
        self.cache.clear()

    def _begin(self, prompts: Sequence[PendingPrompt], tokens: Sequence[int], room: int, *, at_end: bool) -> list[int]:
        """Take slots for prompts: see KVCache.begin. Their prefixes are in the slots then."""
        STEP_TOKENS.observe(sum(len(prompt.segment.ids) for prompt in prompts))
        slots = self.cache.begin(prompts, tokens, room, at_end=at_end)
        for prompt in prompts:
            prompt.release()
        return slots

    def _views(self, rows: int, room: int) -> tuple[list[Tensor], list[Tensor]]:
        """Views of the first `rows` slots: `room` positions of the keys and values, and the extra pools if a row has
        content there."""
        return self.cache.views(rows, room), self.cache.extra_views(rows) if any(self.slots.has_extra) else []

    def _tensor(self, numbers: Sequence[Any]) -> Tensor:
        return to_device(numbers, self._device)


def new_cache(spec: CacheSpec, max_idle_positions: int, blocks: int) -> KVCache:
    """A cache with this many blocks; 0: a cache of slots."""
    if blocks:
        return BlockCache(spec, max_idle_positions, BlockPool(spec, blocks))
    return SlotCache(spec, max_idle_positions)
