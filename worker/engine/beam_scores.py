"""The scores of the sequences that a beam search of stock `generate` returns, without those of whole vocabularies."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor

from worker.engine.row import FinishReason, Output, Row, TokenScore
from worker.engine.stop_strings import Decode, StopStrings
from worker.engine.token_scores import Confidence


class _Step(NamedTuple):
    """What is kept of one step, by beam of all rows."""

    #: The beam's own beam in the step before, within its row, and its newest token.
    parents: Sequence[int]
    newest: Sequence[int]
    #: (beams, kept): the likeliest tokens and their log-probabilities.
    tokens: Any
    logprobs: Any


class BeamRecorder(LogitsProcessor):  # type: ignore[misc]
    """Keeps each step's likeliest tokens of each beam, which are those that the search can choose.

    Probabilities are normalized after all processors, as for rows without beams.
    """

    def __init__(self, num_beams: int, prompt_length: int, kept: int) -> None:
        """`prompt_length`: tokens of a prompt with its padding. `kept`: tokens of each beam, at least as many as the
        search compares."""
        self._num_beams = num_beams
        self._prompt_length = prompt_length
        self._kept = kept
        self._steps: list[_Step] = []
        self._before = torch.empty(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (rows times beams, vocabulary) unchanged. `input_ids`: (rows times beams, length)."""
        beams = torch.stack(torch.split(input_ids[:, self._prompt_length :], self._num_beams))
        if self._steps:
            # (rows, beams, beams before): whether the one continues the other.
            parents = (beams[:, :, None, :-1] == self._before[:, None]).all(dim=-1).int().argmax(dim=-1)
            newest = beams[..., -1]
        else:
            parents = newest = beams.new_zeros(beams.shape[:2])
        self._before = beams
        logprobs, tokens = scores.log_softmax(dim=-1).topk(min(self._kept, scores.shape[1]))
        self._steps.append(
            _Step(parents.flatten().tolist(), newest.flatten().tolist(), tokens.cpu().numpy(), logprobs.cpu().numpy())
        )
        return scores

    def of(self, row: int, ids: Sequence[int], top: int) -> list[TokenScore]:
        """The scores of a returned sequence, with `top` of the likeliest tokens. `ids`: its tokens, with its end."""
        found: list[TokenScore] = []
        first = row * self._num_beams
        beam, before = first, 0
        for step, token in zip(self._steps, ids, strict=False):
            if found:
                places = range(first, first + self._num_beams)
                beam = next(n for n in places if step.parents[n] == beam - first and step.newest[n] == before)
            found.append(_score(step, beam, token, top))
            before = token
        return found


def _score(step: _Step, beam: int, token: int, top: int) -> TokenScore:
    tokens, logprobs = step.tokens[beam].tolist(), step.logprobs[beam].tolist()
    # Of equally likely tokens the last ones may be left out.
    logprob = logprobs[tokens.index(token)] if token in tokens else logprobs[-1]
    likeliest = zip(tokens[:top], logprobs[:top], strict=True)
    return TokenScore(token, logprob, tuple(pair for pair in likeliest if pair[1] > -math.inf))


#: Returns the scores of a sequence with its end, each with so many of the likeliest tokens.
_Scores = Callable[[Sequence[int], int], Sequence[TokenScore]]


def search_output(row: Row, sequence: list[int], decode: Decode, scores: _Scores) -> Output:
    """The output of a row. `sequence`: the new tokens of one of its beams, with padding after their end."""
    end = next((n for n, token in enumerate(sequence) if token in row.sampling.eos_ids), None)
    ids = tuple(sequence[:end])
    reason: FinishReason = "length" if end is None else "stop"
    stop_strings = StopStrings(row.sampling.stop, decode)
    # As for greedy rows, the token that completes the stop string is the last.
    length = next((n for n in range(1, len(ids) + 1) if stop_strings.are_in(ids[:n])), None)
    if length is not None:
        ids, reason, end = ids[:length], "stop_sequence", None
    found = scores(ids if end is None else sequence[: end + 1], row.sampling.logprobs or 0)
    confidence = Confidence()
    for score in found:
        confidence.add(score.logprob)
    return Output(
        ids,
        row.abort_reason(time.monotonic()) or reason,
        confidence=confidence.value,
        scores=() if row.sampling.logprobs is None else tuple(found[: len(ids)]),
    )
