"""The log-likelihood of each label after a prompt, by transformers' own forward. The prompt is prefilled once.

For families without a fast path, and for prompts without pictures.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

Labels = Sequence[Sequence[int]]


class ForwardAdapter(Protocol):
    """The part of a family's adapter that its model's forward needs."""

    model: PreTrainedModel

    def continuation_inputs(self, inputs: dict[str, Tensor], rows: Tensor, length: int) -> dict[str, Tensor]:
        """The family's own forward arguments for `length` tokens after the prompts with indices `rows` (any,).

        `inputs` are the arguments of all prompts (rows, ...). The result has no content that the prompts' keys and
        values hold already.
        """


@torch.inference_mode()
def label_log_likelihoods(
    adapter: ForwardAdapter,
    inputs: dict[str, Tensor],
    labels: Sequence[Labels],
    max_tokens: int,
    heartbeat: Callable[[], None],
) -> list[list[float]]:
    """The log-likelihood of each label for each prompt of a batch: the sum of its tokens' log-probabilities.

    `inputs` are the model's forward arguments for left-padded prompts: `input_ids` and `attention_mask` (rows, length),
    and the family's own. `labels[row]` are the token ids of the row's labels. `max_tokens`: about the maximum tokens
    whose keys and values are held at a time, without those of the prompts.
    """
    positions = _positions(inputs["attention_mask"])
    prompt = adapter.model(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
    heartbeat()
    first = log_softmax(prompt.logits[:, -1].float(), dim=-1)
    scores = _begun(first, labels)
    longer = [(row, n) for row, choices in enumerate(labels) for n, label in enumerate(choices) if len(label) > 1]
    longest = max((len(label) for choices in labels for label in choices), default=0)
    size = max(1, max_tokens // (inputs["input_ids"].shape[1] + longest))
    for chunk in _chunks(longer, size):
        likelihoods = _rest(adapter, inputs, prompt.past_key_values, chunk, labels)
        for (row, n), likelihood in zip(chunk, likelihoods, strict=True):
            scores[row][n] += likelihood
        heartbeat()
    return scores


def _begun(likelihoods: Tensor, labels: Sequence[Labels]) -> list[list[float]]:
    """The log-probability of each label's first token, from those of all tokens after its prompt (rows, vocabulary)."""
    firsts = [torch.tensor([label[0] for label in choices], device=likelihoods.device) for choices in labels]
    picked = likelihoods.gather(1, pad_sequence(firsts, batch_first=True)).tolist()
    return [values[: len(choices)] for values, choices in zip(picked, labels, strict=True)]


def _rest(
    adapter: ForwardAdapter,
    inputs: dict[str, Tensor],
    cache: DynamicCache,
    chunk: Sequence[tuple[int, int]],
    labels: Sequence[Labels],
) -> list[float]:
    """Log-likelihoods of labels without their first tokens.

    `chunk`: the labels, by row and number. `inputs` (rows, ...) and `cache` (rows, heads, length, head size) are those
    of all prompts.
    """
    device = inputs["input_ids"].device
    rows = torch.tensor([row for row, _ in chunk], device=device)
    ids = [torch.tensor(labels[row][n], device=device) for row, n in chunk]
    padded = pad_sequence(ids, batch_first=True, padding_value=0)
    tokens, targets = padded[:, :-1], padded[:, 1:]
    lengths = torch.tensor([len(label) - 1 for label in ids], device=device)
    # Padding on the right needs no mask: no kept token attends to it.
    mask = torch.cat([inputs["attention_mask"][rows], torch.ones_like(tokens)], dim=1)
    continued = {"input_ids": tokens, "attention_mask": mask, "position_ids": _positions(mask)[:, -tokens.shape[1] :]}
    continued |= adapter.continuation_inputs(inputs, rows, tokens.shape[1])
    logits = adapter.model(**continued, past_key_values=_selected(cache, rows), use_cache=True).logits
    picked = log_softmax(logits.float(), dim=-1).gather(2, targets[..., None])[..., 0]
    kept = torch.arange(targets.shape[1], device=device) < lengths[:, None]
    return torch.where(kept, picked, 0.0).sum(dim=1).tolist()


def _positions(mask: Tensor) -> Tensor:
    """Position ids (rows, length) for a mask (rows, length). As in `generate`, left padding has no positions."""
    return (mask.long().cumsum(dim=1) - 1).masked_fill(mask == 0, 1)


def _selected(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A copy with the keys and values of `rows` (any,). Growing it does not change the prompts' cache."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(rows)
    return selected


def _chunks(items: Sequence[tuple[int, int]], size: int) -> Iterator[Sequence[tuple[int, int]]]:
    return (items[start : start + size] for start in range(0, len(items), size))
