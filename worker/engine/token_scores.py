"""How likely chosen tokens are: log-probabilities, and an answer's confidence (see row.TokenScore)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import LogitsProcessor

from worker.engine.row import TokenScore
from worker.engine.tensors import to_device

#: The next token of a row whose logits are NaN.
NO_TOKEN = -1


class Confidence:
    """The geometric mean of the probabilities of an answer's tokens, and of the token that ends it.

    With the ending token an answer without text has a confidence too, and `cat` differs from the beginning of `cattle`.
    """

    def __init__(self) -> None:
        self._sum = 0.0
        self._count = 0

    def add(self, logprob: float) -> None:
        """Add a token by its log-probability."""
        self._sum += logprob
        self._count += 1

    @property
    def value(self) -> float | None:
        """Between 0 and 1; None without tokens."""
        if not self._count:
            return None
        # NaN: no token was possible.
        return 0.0 if math.isnan(self._sum) else math.exp(min(0.0, self._sum / self._count))


def best(logits: Tensor, forbidden: Tensor) -> Tensor:
    """The likeliest token, its log-probability and the row's normalizer (3, rows), by logits (rows, vocabulary).

    In double precision, which holds token ids and single-precision numbers alike: the host reads them in one transfer.
    NO_TOKEN for a row with NaN. Sets the logits of the tokens `forbidden` (any,) to -inf in place.
    """
    highest, tokens = logits.index_fill_(1, forbidden, -torch.inf).max(dim=-1)
    # Softmax reads the vocabulary once; logsumexp takes several passes.
    shares = logits.softmax(dim=-1, dtype=torch.float32).gather(1, tokens[:, None])[:, 0].log()
    tokens = torch.where(highest.isnan(), NO_TOKEN, tokens)
    scores = torch.stack([tokens.double(), shares.double(), highest.double() - shares])
    # Recorded graphs are compared with functions by equality, and NaN equals nothing.
    return scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def chosen(logits: Tensor, normalizers: Tensor, tokens: Tensor) -> Tensor:
    """As `best`, for tokens (rows,) that were chosen otherwise. `normalizers`: (rows,)."""
    found = logits.gather(1, tokens[:, None])[:, 0].double()
    return torch.stack([tokens.double(), found - normalizers, normalizers])


def read(scores: Tensor, logits: Tensor, asked: Mapping[int, int]) -> list[TokenScore]:
    """Scores (3, rows) as `best` gives them, read by the host in one transfer.

    `asked`: the number of likeliest tokens that rows ask for, by index; their log-probabilities are found by `logits`
    (rows, vocabulary).
    """
    rows = scores.shape[1]
    if not asked:
        ids, logprobs = scores[:2].tolist()
        return list(map(TokenScore, map(int, ids), logprobs))
    most = min(max(asked.values()), logits.shape[1])
    places = to_device(list(asked), logits.device)
    values, tokens = logits.index_select(0, places).topk(most)
    top = values.double() - scores[2].index_select(0, places)[:, None]
    numbers = torch.cat([scores[:2].flatten(), top.flatten(), tokens.double().flatten()]).tolist()
    ids, logprobs, numbers = numbers[:rows], numbers[rows : 2 * rows], numbers[2 * rows :]
    found = list(map(TokenScore, map(int, ids), logprobs))
    ends = len(asked) * most
    for number, (place, count) in enumerate(asked.items()):
        start = number * most
        pairs = zip(map(int, numbers[ends + start :]), numbers[start : start + count], strict=False)
        # Without tokens that are impossible.
        found[place] = found[place]._replace(top=tuple(pair for pair in pairs if pair[1] > -math.inf))
    return found


class ScoreRecorder(LogitsProcessor):  # type: ignore[misc]
    """Keeps the scores by which stock `generate` chooses the tokens of a batch without beams."""

    def __init__(self) -> None:
        self._scores = torch.empty(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (rows, vocabulary) unchanged. `input_ids`: (rows, length)."""
        self._scores = scores
        return scores

    def of(self, tokens: Tensor, asked: Mapping[int, int]) -> list[TokenScore]:
        """The scores of the chosen tokens (rows,). `asked`: see `read`."""
        return read(chosen(self._scores, self._scores.logsumexp(dim=-1).double(), tokens), self._scores, asked)
