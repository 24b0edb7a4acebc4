"""Prefill of prompts by transformers' own forward, in chunks of bounded size, with a heartbeat after each.

Stock `generate` would prefill a batch in one forward pass, and each prompt once for each of its beams.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

#: Maximum tokens, with padding, in one forward pass: on a slow CPU they take a large model a minute, in which no
#: heartbeat is sent, and more would not be faster.
CHUNK_TOKENS = 1024


class PaddedPrompts(Protocol):
    """Prompts of a batch, padded on the left to one length, with the features of their pictures."""

    @property
    def ids(self) -> Tensor:
        """Token ids (rows, length)."""

    @property
    def mask(self) -> Tensor:
        """1 for a token, 0 for padding (rows, length)."""

    def forward_inputs(self, start: int, end: int) -> dict[str, Any]:
        """The family's own arguments of the model's forward for the tokens from `start` to `end` of all rows."""

    def continuation_inputs(self, rows: Tensor, length: int) -> dict[str, Any]:
        """The family's own arguments of the model's forward for `length` tokens after the prompts with indices `rows`
        (any,). They have no content that the prompts' keys and values hold already."""

    def generate_inputs(self) -> dict[str, Any]:
        """The family's own arguments of `generate` for all rows. As above, but for what it computes after prefill."""


class Prefilled(NamedTuple):
    """The prompts of a batch after their prefill."""

    prompts: PaddedPrompts
    #: Keys and values (rows, heads, length, head size) of each layer.
    cache: DynamicCache
    #: (rows, vocabulary): of the first new token.
    logits: Tensor

    def continued_cache(self, num_beams: int) -> DynamicCache:
        """Keys and values (rows * beams, heads, length - 1, head size) from which `generate` continues: it computes the
        last token of each prompt itself. For one call, since it changes `cache`."""
        self.cache.batch_repeat_interleave(num_beams)
        self.cache.crop(-1)
        return self.cache


@torch.inference_mode()
def prefill(
    model: PreTrainedModel, prompts: PaddedPrompts, heartbeat: Callable[[], None], chunk_tokens: int = CHUNK_TOKENS
) -> Prefilled:
    """Compute the keys and values of prompts. `chunk_tokens`: maximum tokens, with padding, in one forward pass; it has
    at least one of each row."""
    rows, length = prompts.ids.shape
    positions = positions_of(prompts.mask)
    width = max(1, chunk_tokens // rows)
    # Without the config, the layers hold all tokens, even those that a sliding window has left.
    cache = DynamicCache()
    for start in range(0, length, width):
        end = min(start + width, length)
        logits = model(
            input_ids=prompts.ids[:, start:end],
            attention_mask=prompts.mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **prompts.forward_inputs(start, end),
        ).logits
        heartbeat()
    return Prefilled(prompts, cache, logits[:, -1])


def positions_of(mask: Tensor) -> Tensor:
    """Position ids (rows, length) for a mask (rows, length). As in `generate`, left padding has no positions."""
    return (mask.long().cumsum(dim=1) - 1).masked_fill(mask == 0, 1)
