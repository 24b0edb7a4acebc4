"""Changes of a row's logits that its job asks for: a bias of tokens, and penalties of tokens that occurred.

In this order, before the checkpoint's rules: `logit_bias` is added; `repetition_penalty` divides positive logits and
multiplies negative ones of each token in the prompt or the answer, as in transformers; `frequency_penalty` is
subtracted once for each time that the token is in the answer; `presence_penalty` once if it is, as OpenAI defines them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from worker.engine.progress import RowProgress
from worker.engine.row import Row, Sampling
from worker.engine.tensors import to_device


class Penalties:
    """The changes of a running batch's rows. Keeps their tokens on the device from step to step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        #: The rows that change their logits, by index, and the number of new tokens that are counted of each.
        self._rows: dict[int, tuple[Row, int]] = {}
        self._changes: _Changes | None = None
        #: See _Changes.apply.
        self._ids = self._counts = torch.empty(0)

    def apply(self, logits: Tensor, rows: Mapping[int, RowProgress]) -> Tensor:
        """Logits (rows, vocabulary) after the changes, in single precision if there are any. `rows`: by index."""
        changed = {place: run for place, run in rows.items() if run.row.sampling.changes_logits}
        if not changed:
            self._changes, self._rows = None, {}
            return logits
        logits = logits.float()
        now = {place: (run.row, len(run.new)) for place, run in changed.items()}
        if self._changes and now == {place: (row, count + 1) for place, (row, count) in self._rows.items()}:
            newest = to_device([[run.last] for run in changed.values()], self._device)
            self._ids = torch.cat([self._ids, newest], dim=1)
            _count(self._counts, newest)
        else:
            self._changes = _Changes({place: row for place, (row, _) in now.items()}, self._device)
            self._ids = _padded([(*run.row.tokens.ids, *run.new) for run in changed.values()], self._device)
            self._counts = _counts([run.new for run in changed.values()], logits.shape[1], self._device)
        self._rows = now
        self._changes.apply(logits, self._ids, self._counts)
        return logits


class StockPenalties(LogitsProcessor):  # type: ignore[misc]
    """The changes of each row of a batch, for stock `generate` with any number of beams."""

    def __init__(self, rows: Sequence[Row], num_beams: int, prompt_length: int, device: torch.device) -> None:
        """`prompt_length`: tokens of a prompt with its padding."""
        self._prompt_length = prompt_length
        changed = {
            number * num_beams + beam: row
            for number, row in enumerate(rows)
            if row.sampling.changes_logits
            for beam in range(num_beams)
        }
        self._changes = _Changes(changed, device) if changed else None
        self._prompts = _padded([row.tokens.ids for row in changed.values()], device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Change scores (rows times beams, vocabulary) in place. `input_ids`: (rows times beams, length)."""
        if self._changes:
            new = input_ids[:, self._prompt_length :].index_select(0, self._changes.places)
            counts = _count(scores.new_zeros(len(new), scores.shape[1]), new)
            self._changes.apply(scores, torch.cat([self._prompts, new], dim=1), counts)
        return scores


class _Changes:
    """What rows of a batch ask for, as tensors."""

    def __init__(self, rows: Mapping[int, Row], device: torch.device) -> None:
        """`rows`: by index."""
        #: (rows,)
        self.places = to_device(list(rows), device)
        penalties = [_penalties(row.sampling) for row in rows.values()]
        self._repetition, self._frequency, self._presence = torch.split(to_device(penalties, device), 1, dim=1)
        bias = [(place, *pair) for place, row in rows.items() for pair in row.sampling.logit_bias]
        self._biased = _places([(place, id) for place, id, _ in bias], device)
        self._bias = to_device([value for _, _, value in bias], device, torch.float32)

    def apply(self, logits: Tensor, ids: Tensor, counts: Tensor) -> None:
        """Change the rows' logits (all rows, vocabulary) in place.

        `ids` (rows, any): the tokens of prompt and answer, each once or more. `counts` (rows, vocabulary): how often a
        token is in the answer.
        """
        logits.index_put_(self._biased, self._bias, accumulate=True)
        rows = logits.index_select(0, self.places)
        values = rows.gather(1, ids)
        values = torch.where(values < 0, values * self._repetition, values / self._repetition)
        count = counts.gather(1, ids)
        values = values - self._frequency * count - self._presence * (count > 0)
        # A token that is there twice gets the same value twice.
        logits.index_copy_(0, self.places, rows.scatter(1, ids, values))


def _penalties(sampling: Sampling) -> tuple[float, float, float]:
    return sampling.repetition_penalty or 1.0, sampling.frequency_penalty, sampling.presence_penalty


def _places(pairs: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, ...]:
    """Rows and tokens, as the indices of a tensor (rows, vocabulary): each (pairs,)."""
    return to_device(pairs, device, torch.long).view(-1, 2).unbind(dim=1)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """One tensor (rows, longest), each row padded with a token of its own."""
    longest = max(map(len, rows), default=0)
    return to_device([[*row, *[row[0]] * (longest - len(row))] for row in rows], device, torch.long)


def _counts(rows: Sequence[Sequence[int]], vocabulary: int, device: torch.device) -> Tensor:
    """How often each token is in each row (rows, vocabulary)."""
    counts = torch.zeros(len(rows), vocabulary, device=device)
    pairs = [(number, id) for number, row in enumerate(rows) for id in row]
    return counts.index_put_(_places(pairs, device), counts.new_ones(()), accumulate=True)


def _count(counts: Tensor, tokens: Tensor) -> Tensor:
    """Add tokens (rows, any) to the counts (rows, vocabulary) in place."""
    return counts.scatter_add_(1, tokens, counts.new_ones(()).expand(tokens.shape))
