"""Logits processors: a checkpoint's rules for one row, by transformers' own classes.

They are what stock `generate` applies to that job alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from worker.engine.row import Row


class RowRules:
    """The rules of one row. They are applied to its own tokens without padding, so that other rows change nothing."""

    def __init__(self, row: Row, rules: Mapping[str, Any], device: torch.device) -> None:
        self._ids = torch.tensor([row.tokens.ids], device=device)
        ends = torch.tensor(sorted(row.sampling.eos_ids), device=device)
        limit = len(row.tokens.ids) + row.sampling.max_new_tokens
        # In the order in which stock `generate` applies them, which is that of SCORE_RULES.
        self._processors = [_MAKERS[name](value, self._ids, ends, limit) for name, value in rules.items()]

    def apply(self, new: Sequence[int], scores: Tensor) -> Tensor:
        """The next token's scores (vocabulary) as the rules leave them, after the tokens in `new`."""
        ids = torch.cat([self._ids, torch.tensor([new], dtype=self._ids.dtype, device=self._ids.device)], dim=1)
        changed = scores[None]
        for processor in self._processors:
            changed = processor(ids, changed)
        return changed[0]


class BatchRules(LogitsProcessor):  # type: ignore[misc]
    """The rules of each row of a batch, for stock `generate` with one beam."""

    def __init__(self, rows: Sequence[Row], rules: Mapping[str, Any], device: torch.device, prompt_length: int) -> None:
        """`prompt_length`: tokens of the padded prompts."""
        self._rules = [RowRules(row, rules, device) for row in rows]
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (rows, vocabulary) after the tokens (rows, prompt length and new ones)."""
        new = input_ids[:, self._prompt_length :].tolist()
        return torch.stack([rules.apply(ids, row) for rules, ids, row in zip(self._rules, new, scores, strict=True)])


#: Given the rule's value, the prompt's ids (1, length), the ids of the tokens that end a text, and the length (tokens)
#: at which the row ends at the latest.
_Maker = Callable[[Any, Tensor, Tensor, int], LogitsProcessor]

_MAKERS: Mapping[str, _Maker] = {
    "sequence_bias": lambda value, ids, ends, limit: SequenceBiasLogitsProcessor(value),
    "encoder_repetition_penalty": lambda value, ids, ends, limit: EncoderRepetitionPenaltyLogitsProcessor(value, ids),
    "repetition_penalty": lambda value, ids, ends, limit: RepetitionPenaltyLogitsProcessor(value),
    "no_repeat_ngram_size": lambda value, ids, ends, limit: NoRepeatNGramLogitsProcessor(value),
    "encoder_no_repeat_ngram_size": lambda value, ids, ends, limit: EncoderNoRepeatNGramLogitsProcessor(value, ids),
    "bad_words_ids": lambda value, ids, ends, limit: NoBadWordsLogitsProcessor(value, ends),
    "min_length": lambda value, ids, ends, limit: MinLengthLogitsProcessor(value, ends, ids.device),
    "min_new_tokens": lambda value, ids, ends, limit: MinNewTokensLengthLogitsProcessor(
        ids.shape[1], value, ends, ids.device
    ),
    "forced_bos_token_id": lambda value, ids, ends, limit: ForcedBOSTokenLogitsProcessor(value),
    "forced_eos_token_id": lambda value, ids, ends, limit: ForcedEOSTokenLogitsProcessor(limit, value, ids.device),
    "exponential_decay_length_penalty": lambda value, ids, ends, limit: ExponentialDecayLengthPenalty(
        value, ends, ids.shape[1]
    ),
    "suppress_tokens": lambda value, ids, ends, limit: SuppressTokensLogitsProcessor(value, ids.device),
    "begin_suppress_tokens": lambda value, ids, ends, limit: SuppressTokensAtBeginLogitsProcessor(
        value, ids.shape[1], ids.device
    ),
}
