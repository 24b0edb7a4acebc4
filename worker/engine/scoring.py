"""The probabilities of labels: token sequences scored after a prompt that is prefilled once.

`continuous.py` uses this for families with a fast path; `stock_scoring.py` is for the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tasks.errors import Internal
from worker.engine.row import Output, Row
from worker.engine.tensors import padded

#: Owner of the prompt's tokens, and of padding.
PROMPT, PADDING = -1, -2

#: For each row, the token sequences that may follow its prompt.
Continuations = Sequence[Sequence[Sequence[int]]]


class TokenTree(NamedTuple):
    """Several token sequences side by side after each row's prompt, run as one sequence.

    Tree attention (Miao et al., "SpecInfer", 2023): each token attends to the prompt and to its own sequence only, so
    that all sequences share the prompt's keys and values.
    """

    #: (rows, length): the tokens of the prompt that are not prefilled yet, then each sequence without its last token.
    ids: Tensor
    #: (rows, length): the index of the token's sequence, PROMPT or PADDING.
    owner: Tensor
    #: (rows, length): a token's position after the prefilled tokens.
    depth: Tensor
    #: (rows, targets): each sequence without its first token, which are the tokens to score.
    targets: Tensor

    @classmethod
    def build(
        cls, prompts: Sequence[Sequence[int]], continuations: Continuations, device: torch.device
    ) -> TokenTree | None:
        """`prompts`: the tokens of each that are not prefilled yet. Returns None if there is no token to run."""
        rows = list(zip(prompts, continuations, strict=True))
        ids = [[*prompt, *(token for sequence in row for token in sequence[:-1])] for prompt, row in rows]
        owners = [
            [PROMPT] * len(prompt) + [number for number, sequence in enumerate(row) for _ in sequence[1:]]
            for prompt, row in rows
        ]
        depths = [
            [*range(len(prompt)), *(len(prompt) + depth for sequence in row for depth in range(len(sequence) - 1))]
            for prompt, row in rows
        ]
        targets = [[token for sequence in row for token in sequence[1:]] for row in continuations]
        length = max(map(len, ids))
        if not length:
            return None
        return cls(
            padded(ids, length, 0, device),
            padded(owners, length, PADDING, device),
            padded(depths, length, 0, device),
            padded(targets, max(map(len, targets)), 0, device),
        )


def by_sequence(numbers: Sequence[float], sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Split a row's numbers, one for each target, by sequence."""
    rest = iter(numbers)
    return [list(itertools.islice(rest, len(sequence) - 1)) for sequence in sequences]


def label_parts(rows: Sequence[Row], max_tokens: int) -> Iterator[slice]:
    """Slices of the rows' labels, each with at most about `max_tokens` tokens in all rows together."""
    most = max(len(row.labels) for row in rows)
    longest = max(len(label) for row in rows for label in row.labels)
    size = max(1, max_tokens // (len(rows) * longest))
    return (slice(start, start + size) for start in range(0, most, size))


def add_likelihoods(
    scores: Sequence[list[float]], part: slice, likelihoods: Sequence[Sequence[Sequence[float]]]
) -> None:
    """Add the log-probabilities of tokens to the scores of the labels in a slice, in place."""
    for row, labels in zip(scores, likelihoods, strict=True):
        for number, tokens in enumerate(labels, start=part.start):
            row[number] += sum(tokens)


def finish_scored(rows: Sequence[Row], likelihoods: Sequence[Sequence[float]]) -> None:
    """Finish rows with the probabilities of their labels, given the labels' log-likelihoods."""
    for row, scores in zip(rows, likelihoods, strict=True):
        if any(map(math.isnan, scores)):
            row.fail(overflow())
            continue
        # Without torch, whose calls take longer for a few numbers.
        best = max(scores)
        parts = [math.exp(score - best) for score in scores]
        total = math.fsum(parts)
        row.finish(Output((), "stop", tuple(part / total for part in parts)))


def overflow() -> Internal:
    """The error of a row whose logits are NaN."""
    return Internal("The model's numbers overflow on this job: load it with IDEFICS_DTYPE=bfloat16 or float32.")
