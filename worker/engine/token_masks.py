"""Masks of the tokens that grammars allow next, computed in a thread while the model computes the next step."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import torch
from llguidance import LLExecutor, LLMatcher
from torch import Tensor

from worker.engine.grammar import GrammarState
from worker.engine.progress import RowProgress
from worker.engine.tensors import to_device, upload

#: Bits of a mask's word.
WORD = 32
#: Threads that compute masks beside a GPU: more would not be faster for the rows of a usual batch.
THREADS = 8


class TokenMasks:
    """Masks the logits of rows with grammars. For the engine's thread."""

    def __init__(self, reserved: Iterable[int], device: torch.device) -> None:
        """`reserved`: tokens that no answer contains, whatever its grammar says."""
        self._reserved = to_device(sorted(reserved), device, torch.long)
        self._device = device
        self._shifts = torch.arange(WORD, dtype=torch.int32, device=device)
        self._thread = ThreadPoolExecutor(1, "masks")

    @functools.cached_property
    def _executor(self) -> LLExecutor:
        # On a CPU the model needs the cores itself.
        return LLExecutor(1 if self._device.type == "cpu" else min(THREADS, os.cpu_count() or 1))

    def compute(self, rows: Iterable[RowProgress]) -> None:
        """Begin to compute the next masks of those rows with grammars that go on after their newest token."""
        states = [row.grammar for row in rows if row.grammar and not row.row.is_done]
        if not states:
            return
        words = len(states[0].first_mask) // (WORD // 8)
        masks = torch.empty((len(states), words), dtype=torch.int32)
        matchers = [(state.matcher, place) for place, state in enumerate(states)]
        done = self._thread.submit(self._fill, matchers, masks)
        for state, mask in zip(states, masks, strict=True):
            state.next_mask = done, mask

    def apply(self, logits: Tensor, states: Mapping[int, GrammarState]) -> None:
        """In `logits` (rows, vocabulary), in place, set those tokens to -inf that a row's grammar does not allow.

        `states`: those of the rows with a grammar, by the row's index.
        """
        masks = upload(torch.stack([_next_mask(state) for state in states.values()]), self._device)
        bits = (masks[:, :, None] >> self._shifts & 1).flatten(1)[:, : logits.shape[1]]
        banned = (bits == 0).index_fill_(1, self._reserved, True)
        places = to_device(list(states), self._device)
        logits.index_copy_(0, places, logits.index_select(0, places).masked_fill_(banned, -torch.inf))

    def _fill(self, matchers: list[tuple[LLMatcher, int]], masks: Tensor) -> None:
        """Compute the masks (rows, words). Other threads run meanwhile."""
        words = masks.shape[1]
        self._executor.unsafe_compute_mask_ptr(matchers, masks.data_ptr(), words * WORD // 8, len(masks))


def _next_mask(state: GrammarState) -> Tensor:
    """A row's next mask (words,)."""
    if state.next_mask is None:
        return torch.frombuffer(bytearray(state.first_mask), dtype=torch.int32)
    done, mask = state.next_mask
    done.result()
    return cast(Tensor, mask)
