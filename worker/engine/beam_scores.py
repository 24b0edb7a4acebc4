"""The scores of the sequences that a beam search of stock `generate` returns, without those of whole vocabularies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor

from worker.engine.row import TokenScore


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
