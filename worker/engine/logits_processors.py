"""Logits processors that apply a checkpoint's generation rules to each row of a batch.

The processors are transformers' own, with the arguments that stock `generate` gives them for that row alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
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

from worker.engine.row import Row, Sampling
from worker.engine.tensors import to_device

#: Rules about n-grams: whether n-grams with new tokens count, or only those of the prompt.
NGRAM_RULES = {"no_repeat_ngram_size": True, "encoder_no_repeat_ngram_size": False}


class RowRules:
    """The rules of one row, applied to its tokens without padding, so that other rows have no influence."""

    def __init__(self, row: Row, rules: Mapping[str, Any], device: torch.device) -> None:
        self._ids = to_device([row.tokens.ids], device)
        self._processors = [
            NGramBan(row.tokens.ids, rules[name], counts_new=NGRAM_RULES[name]) if name in NGRAM_RULES else make()
            for name, make in _makers(row, rules, self._ids)
        ]

    def apply(self, new: Sequence[int], scores: Tensor) -> Tensor:
        """Apply the rules to the next token's scores (vocabulary), after the new tokens `new`; same shape."""
        ids = torch.cat([self._ids, to_device([new], self._ids.device, self._ids.dtype)], dim=1)
        changed = scores[None]
        for processor in self._processors:
            changed = processor.apply(new, changed) if isinstance(processor, NGramBan) else processor(ids, changed)
        return changed[0]


class BeamRules:
    """The rules of one row's beams."""

    def __init__(self, row: Row, rules: Mapping[str, Any], device: torch.device) -> None:
        makers = _makers(row, rules, to_device([row.tokens.ids], device))
        self._processors = LogitsProcessorList(make() for _, make in makers)

    def apply(self, ids: Tensor, scores: Tensor) -> Tensor:
        """The beams' scores (beams, vocabulary) after the rules. `ids` (beams, length): prompts and new tokens."""
        changed: Tensor = self._processors(ids, scores)
        return changed


def _makers(row: Row, rules: Mapping[str, Any], ids: Tensor) -> Iterator[tuple[str, Callable[[], LogitsProcessor]]]:
    """What makes transformers' processor of each of a row's rules. `ids` (1, length): the prompt's tokens."""
    eos_ids = to_device(sorted(row.sampling.eos_ids), ids.device)
    limit = ids.shape[1] + row.sampling.max_new_tokens
    # SCORE_RULES has the order in which stock `generate` applies them.
    for name, value in rules_of(row.sampling, rules).items():
        yield name, functools.partial(_MAKERS[name], value, ids, eos_ids, limit)


def rules_of(sampling: Sampling, rules: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint's rules that apply to a row: without those for which its job has a value of its own."""
    own = {"repetition_penalty"} if sampling.repetition_penalty is not None else set()
    return {name: value for name, value in rules.items() if name not in own}


class NGramBan:
    """Bans each token that would complete an n-gram which the row has already, or which its prompt has.

    The same as transformers' NoRepeatNGramLogitsProcessor and its Encoder variant, which read the tokens back from the
    device, and count all n-grams again at each step.
    """

    def __init__(self, prompt: Sequence[int], size: int, *, counts_new: bool) -> None:
        """`prompt`: its tokens. `size`: tokens of an n-gram. `counts_new`: whether n-grams with new tokens count."""
        self._prompt = prompt
        self._size = size
        self._counts_new = counts_new
        #: By an n-gram's other tokens: its last tokens.
        self._last: dict[tuple[int, ...], set[int]] = {}
        #: Tokens whose n-grams are counted.
        self._counted = 0

    def apply(self, new: Sequence[int], scores: Tensor) -> Tensor:
        """Set the scores (1, vocabulary) of banned tokens to -inf, after the new tokens `new`. Returns a copy."""
        ids = (*self._prompt, *new)
        counted = len(ids) if self._counts_new else len(self._prompt)
        for end in range(max(self._counted + 1, self._size), counted + 1):
            *others, last = ids[end - self._size : end]
            self._last.setdefault(tuple(others), set()).add(last)
        self._counted = counted
        banned = self._last.get(ids[len(ids) + 1 - self._size :], ())
        return scores.index_fill(1, to_device(list(banned), scores.device, torch.long), -torch.inf)


class BatchRules(LogitsProcessor):  # type: ignore[misc]
    """The rules of each row of a batch, for stock `generate` with one beam."""

    def __init__(self, rows: Sequence[Row], rules: Mapping[str, Any], device: torch.device, prompt_length: int) -> None:
        """`prompt_length`: tokens of a prompt with its padding."""
        self._rules = [RowRules(row, rules, device) for row in rows]
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Apply each row's rules to its scores (rows, vocabulary); `input_ids`: (rows, prompt length + new tokens)."""
        new = input_ids[:, self._prompt_length :].tolist()
        return torch.stack([rules.apply(ids, row) for rules, ids, row in zip(self._rules, new, scores, strict=True)])


#: Arguments: the rule's value, the prompt's ids (1, length), the ids of the tokens that end the answer (any,), and the
#: maximum tokens of prompt and answer.
_Maker = Callable[[Any, Tensor, Tensor, int], LogitsProcessor]

_MAKERS: Mapping[str, _Maker] = {
    "sequence_bias": lambda value, ids, eos, limit: SequenceBiasLogitsProcessor(value),
    "encoder_repetition_penalty": lambda value, ids, eos, limit: EncoderRepetitionPenaltyLogitsProcessor(value, ids),
    "repetition_penalty": lambda value, ids, eos, limit: RepetitionPenaltyLogitsProcessor(value),
    "no_repeat_ngram_size": lambda value, ids, eos, limit: NoRepeatNGramLogitsProcessor(value),
    "encoder_no_repeat_ngram_size": lambda value, ids, eos, limit: EncoderNoRepeatNGramLogitsProcessor(value, ids),
    "bad_words_ids": lambda value, ids, eos, limit: NoBadWordsLogitsProcessor(value, eos),
    "min_length": lambda value, ids, eos, limit: MinLengthLogitsProcessor(value, eos, ids.device),
    "min_new_tokens": lambda value, ids, eos, limit: MinNewTokensLengthLogitsProcessor(
        ids.shape[1], value, eos, ids.device
    ),
    "forced_bos_token_id": lambda value, ids, eos, limit: ForcedBOSTokenLogitsProcessor(value),
    "forced_eos_token_id": lambda value, ids, eos, limit: ForcedEOSTokenLogitsProcessor(limit, value, ids.device),
    "exponential_decay_length_penalty": lambda value, ids, eos, limit: ExponentialDecayLengthPenalty(
        value, eos, ids.shape[1]
    ),
    "suppress_tokens": lambda value, ids, eos, limit: SuppressTokensLogitsProcessor(value, ids.device),
    "begin_suppress_tokens": lambda value, ids, eos, limit: SuppressTokensAtBeginLogitsProcessor(
        value, ids.shape[1], ids.device
    ),
}
