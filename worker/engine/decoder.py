"""A family's decoder with a cache of slots, so that rows can join and leave a batch at any step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from worker.engine.cuda_graphs import Graphed, Step, bucket
from worker.engine.interfaces import Decoder, PendingPrompt, Prefix
from worker.engine.kv_cache import SlotCache, grown
from worker.engine.row import Tokens
from worker.engine.scoring import Continuations, TokenTree, by_sequence
from worker.engine.slots import Move, SlotTable
from worker.engine.tensors import to_device
from worker.engine.traced import Traced


class SlotDecoder:
    """Prefills prompts into slots, appends one token to every slot per step, and scores continuations of slots."""

    def __init__(
        self, decoder: Decoder, max_idle_positions: int = 2**16, record: Callable[[Step], Step] | None = None
    ) -> None:
        """`max_idle_positions`: see kv_cache.KVPool.

        `record`: see cuda_graphs.Graphed; None runs steps without recording.
        """
        self.slots = SlotTable()
        self.cache = SlotCache(decoder.spec, max_idle_positions)
        self.family = decoder
        self._device = decoder.spec.device
        self._step = Traced(decoder.step)
        self._graphed = Graphed(decoder.step, record) if record else None
        self._branch = Traced(decoder.branch)

    def empty_like(self, max_idle_positions: int) -> SlotDecoder:
        """The same decoder with an empty cache of its own. `max_idle_positions`: see kv_cache.KVPool."""
        other = copy.copy(self)
        other.slots, other.cache = SlotTable(), self.cache.empty_like(max_idle_positions)
        return other

    def pending(self, tokens: Tokens, prefix: Prefix | None, features: Mapping[bytes, Tensor]) -> PendingPrompt:
        """A pending prompt of the tokens after a prefix. `features`: those of their pictures, by key, in any shape."""
        return PendingPrompt(self.family.segment(tokens, features, prefix.carry if prefix else None), prefix)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[PendingPrompt]) -> tuple[Sequence[int], Tensor]:
        """Prefill prompts into free slots.

        Returns the slots in the prompts' order, and the logits (prompts, vocabulary) of the next tokens.
        """
        segments = [prompt.segment for prompt in prompts]
        # Rows without a carry get the last slots in order, so that views of the caches need no copy.
        in_order = all(segment.carry is None for segment in segments)
        slots = self._take(prompts, at_end=in_order)
        self_kv, extra = self._prompt_views(prompts, slots, max(len(segment.ids) for segment in segments))
        starts = [prompt.start for prompt in prompts]
        if not in_order:
            return slots, self.family.prefill(segments, starts, slots, self_kv, extra)
        row_views = [view[slots[0] :] for view in self_kv]
        return slots, self.family.prefill(segments, starts, range(len(slots)), row_views, ())

    @torch.inference_mode()
    def prefill_prefix(self, prompt: PendingPrompt) -> Prefix:
        """Prefill the beginning of a prompt, copy it, and free its slot."""
        (slot,), _ = self.prefill([prompt])
        prefix = self.cache.copy_prefix(slot, self.slots.lengths[slot], prompt.segment.carry)
        self.release([slot])
        return prefix

    @torch.inference_mode()
    def prefill_scored(
        self, prompts: Sequence[PendingPrompt], firsts: Sequence[Sequence[int]], continuations: Continuations
    ) -> tuple[Sequence[int], list[list[float]], list[list[list[float]]]]:
        """Prefill prompts, and score continuations in the same forward. No slot may be in use.

        Returns the prompts' slots; for each prompt, the log-probabilities of its `firsts` as the next token; and what
        `score_continuations` returns.
        """
        assert not len(self.slots), "a slot is in use"
        slots = self._take(prompts, at_end=True)
        segments = [prompt.segment for prompt in prompts]
        tree = TokenTree.build([segment.ids for segment in segments], continuations, self._device)
        assert tree, "a prompt has tokens"
        self_kv, extra = self._prompt_views(prompts, slots, tree.ids.shape[1])
        starts = [prompt.start for prompt in prompts]
        scores = self.family.prefill_scored(segments, starts, tree, firsts, self_kv, extra).tolist()
        behind = max(map(len, firsts))
        return (
            slots,
            [row[: len(asked)] for row, asked in zip(scores, firsts, strict=True)],
            [by_sequence(row[behind:], sequences) for row, sequences in zip(scores, continuations, strict=True)],
        )

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each slot and return the logits (slots, vocabulary) of the next. Free slots take any."""
        rows, length = len(self.slots), self.slots.longest + 1
        if self._graphed:
            # Rounded up, so that few shapes are recorded; the additional rows are free slots.
            rows, length = bucket(rows), grown(length)
        free = [0] * (rows - len(self.slots))
        # One tensor, since making each one releases and reacquires the interpreter lock.
        numbers = self._tensor([[*tokens, *free], [*self.slots.lengths, *free], [*self.slots.has_extra, *free]])
        views = self._views(rows, length)
        logits = self._graphed(numbers, views) if self._graphed else self._step(numbers, *views)
        self.slots.advance()
        return logits[: len(self.slots)]

    @torch.inference_mode()
    def score_continuations(self, continuations: Continuations) -> list[list[list[float]]]:
        """Log-probabilities of continuations of each slot. The slots' content is not changed.

        `continuations[slot]` are token sequences, each of which follows the slot's prompt. The result has, for each
        sequence, a number for each token except the first, whose probability the prompt's prefill gave.
        """
        tree = TokenTree.build([()] * len(continuations), continuations, self._device)
        if tree is None:
            return [[[] for _ in sequences] for sequences in continuations]
        starts, has_extra = self._tensor([self.slots.lengths, self.slots.has_extra]).unbind()
        views = self._views(len(self.slots), self.slots.longest + tree.ids.shape[1])
        scores = self._branch(tree.ids, starts, tree.targets, tree.owner, tree.depth, has_extra, *views).tolist()
        return [by_sequence(row, sequences) for row, sequences in zip(scores, continuations, strict=True)]

    def release(self, slots: Sequence[int]) -> None:
        """Free slots. Once none is in use, also free memory beyond `max_idle_positions`."""
        self.slots.release(slots)
        if not len(self.slots):
            self.cache.shrink()

    @torch.inference_mode()
    def compact(self) -> list[Move]:
        """Move the last rows to free slots if many slots are free. Returns the moves."""
        rows, has_extra = len(self.slots), any(self.slots.has_extra)
        moves = self.slots.compact()
        if moves:
            longest = self.slots.longest
            extra = self.cache.extra_views(rows) if has_extra else []
            self.cache.compact(moves, self.cache.self_views(rows, longest, longest) + extra)
        return moves

    def clear(self) -> None:
        """Free all slots and their memory, after a failure."""
        self.slots.clear()
        self.cache.clear()

    def _take(self, prompts: Sequence[PendingPrompt], *, at_end: bool) -> list[int]:
        """Take slots for prompts."""
        lengths = [prompt.start + len(prompt.segment.ids) for prompt in prompts]
        return self.slots.take(lengths, [prompt.segment.carry is not None for prompt in prompts], at_end=at_end)

    def _prompt_views(
        self, prompts: Sequence[PendingPrompt], slots: Sequence[int], length: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Views of the self K/V pool and the extra pools, each (slots, heads, positions, head size).

        The prompts' prefixes are in their slots, with room for `length` tokens after them.
        """
        rows = len(self.slots)
        self_kv = self.cache.self_views(rows, max(prompt.start for prompt in prompts) + length, self.slots.longest)
        self._restore_prefixes(prompts, slots)
        has_extra = any(prompt.segment.carry is not None for prompt in prompts)
        return self_kv, self.cache.extra_views(rows) if has_extra else []

    def _restore_prefixes(self, prompts: Sequence[PendingPrompt], slots: Sequence[int]) -> None:
        """Copy the prompts' prefixes into their slots, each distinct prefix in one call."""
        places: dict[int, list[int]] = {}
        prefixes = {id(prompt.prefix): prompt.prefix for prompt in prompts if prompt.prefix}
        for slot, prompt in zip(slots, prompts, strict=True):
            places.setdefault(id(prompt.prefix), []).append(slot)
        for key, prefix in prefixes.items():
            self.cache.restore_prefix(prefix, places[key])

    def _views(self, rows: int, length: int) -> list[Tensor]:
        """Views of the first `rows` slots, each (slots, heads, positions, head size): `length` positions of the self
        K/V pool, and the extra pools if a row has content there."""
        views = self.cache.self_views(rows, length, self.slots.longest)
        return views + self.cache.extra_views(rows) if any(self.slots.has_extra) else views

    def _tensor(self, numbers: Sequence[Any]) -> Tensor:
        return to_device(numbers, self._device)
