"""Masks of the tokens that grammars allow next, computed in a thread while the model computes the next step."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, cast

import torch
from llguidance import LLExecutor, LLMatcher
from torch import Tensor

from worker.engine.grammar import GrammarState
from worker.engine.tensors import to_device, upload
from worker.engine.traced import Traced

#: Threads that compute masks beside a GPU: more would not be faster for the rows of a usual batch.
THREADS = 8


class _Masks(NamedTuple):
    """The next masks of the rows of one step."""

    #: Done once they are computed.
    computed: Future[None]
    #: A bit for each token, the lowest bit of a byte first (rows, bytes).
    bits: Tensor


class TokenMasks:
    """Masks the logits of rows with grammars. For the engine's thread."""

    def __init__(self, reserved: Iterable[int], device: torch.device) -> None:
        """`reserved`: tokens that no answer contains, whatever its grammar says."""
        self._reserved = to_device(sorted(reserved), device, torch.long)
        self._device = device
        self._limit = Traced(limit)
        self._limits = _limits_of_bytes(device)
        self._thread = ThreadPoolExecutor(1, "masks")
        #: The rows whose masks were computed together last.
        self._newest: Sequence[GrammarState] = ()

    @functools.cached_property
    def _executor(self) -> LLExecutor:
        # On a CPU the model needs the cores itself.
        return LLExecutor(1 if self._device.type == "cpu" else min(THREADS, os.cpu_count() or 1))

    def compute(self, states: Sequence[GrammarState]) -> None:
        """Begin to compute the next masks of those rows that go on after their newest token."""
        if not states:
            return
        bits = torch.empty((len(states), len(states[0].first_mask)), dtype=torch.uint8)
        matchers = [(state.matcher, place) for place, state in enumerate(states)]
        masks = _Masks(self._thread.submit(self._fill, matchers, bits), bits)
        for place, state in enumerate(states):
            state.next_mask = masks, place
        self._newest = states

    def apply(self, logits: Tensor, states: Mapping[int, GrammarState]) -> None:
        """In `logits` (rows, vocabulary), in place, set those tokens to -inf that a row's grammar does not allow.

        `states`: those of the rows with a grammar, by the row's index. NaN stays.
        """
        bits = upload(self._next_masks(list(states.values())), self._device)
        if len(states) == len(logits):
            self._limit(logits, bits, self._limits, self._reserved)
            return
        places = to_device(list(states), self._device)
        rows = logits.index_select(0, places)
        self._limit(rows, bits, self._limits, self._reserved)
        logits.index_copy_(0, places, rows)

    def _next_masks(self, states: Sequence[GrammarState]) -> Tensor:
        """The next masks (rows, bytes) of rows."""
        if states != self._newest:
            return torch.stack([_next_mask(state) for state in states])
        # Faster than one by one.
        masks: _Masks = states[0].next_mask[0]
        masks.computed.result()
        return masks.bits

    def _fill(self, matchers: list[tuple[LLMatcher, int]], bits: Tensor) -> None:
        """Compute masks (rows, bytes). Other threads run meanwhile."""
        self._executor.unsafe_compute_mask_ptr(matchers, bits.data_ptr(), bits.shape[1], len(bits))


def limit(logits: Tensor, bits: Tensor, limits: Tensor, reserved: Tensor) -> Tensor:
    """In `logits` (rows, vocabulary), in place, set those tokens to -inf that a row may not have.

    `bits` (rows, bytes): those of the tokens that a row's grammar allows. `limits`: see _limits_of_bytes. `reserved`
    (any,): tokens that no row may have. Returns the largest logits that tokens may have, as `logits`.
    """
    largest = torch.embedding(limits.to(logits.dtype), bits.int()).flatten(1)[:, : logits.shape[1]]
    largest = largest.index_fill_(1, reserved, -torch.inf)
    # Several times as fast as masked_fill_ on a CPU, and NaN stays.
    logits.clamp_max_(largest)
    return largest


def _limits_of_bytes(device: torch.device) -> Tensor:
    """For each byte of a mask, the largest logits of its eight tokens (256, 8): infinite where the bit is set, or
    -inf."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return torch.where(bits == 1, torch.inf, -torch.inf).to(device)


def _next_mask(state: GrammarState) -> Tensor:
    """A row's next mask (bytes,)."""
    if state.next_mask is None:
        return torch.frombuffer(bytearray(state.first_mask), dtype=torch.uint8)
    masks, place = state.next_mask
    masks.computed.result()
    return cast(Tensor, masks.bits[place])
