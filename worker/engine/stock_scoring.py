"""The log-likelihood of each label after a prompt, by transformers' own forward. The prompt is prefilled once.

For models without a fast path.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from worker.engine.stock_prefill import Prefilled, positions_of

#: Maximum label tokens, with padding, in one forward pass: each needs the logits of the whole vocabulary.
LABEL_TOKENS = 1024

Labels = Sequence[Sequence[int]]


@torch.inference_mode()
def label_log_likelihoods(
    model: PreTrainedModel,
    prefilled: Prefilled,
    labels: Sequence[Labels],
    max_tokens: int,
    heartbeat: Callable[[], None],
) -> list[list[float]]:
    """The log-likelihood of each label for each prompt of a batch: the sum of its tokens' log-probabilities.

    `labels[row]` are the token ids of the row's labels. `max_tokens`: about the maximum tokens whose keys and values
    are held at a time, without those of the prompts.
    """
    scores = _begun(log_softmax(prefilled.logits.float(), dim=-1), labels)
    longer = [(row, n) for row, choices in enumerate(labels) for n, label in enumerate(choices) if len(label) > 1]
    longest = max((len(label) for choices in labels for label in choices), default=0)
    size = max(1, min(max_tokens // (prefilled.prompts.ids.shape[1] + longest), LABEL_TOKENS // max(1, longest)))
    for chunk in _chunks(longer, size):
        likelihoods = _rest(model, prefilled, chunk, labels)
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
    model: PreTrainedModel,
    prefilled: Prefilled,
    chunk: Sequence[tuple[int, int]],
    labels: Sequence[Labels],
) -> list[float]:
    """Log-likelihoods of labels without their first tokens. `chunk`: the labels, by row and number."""
    prompts = prefilled.prompts
    device = prompts.ids.device
    rows = torch.tensor([row for row, _ in chunk], device=device)
    ids = [torch.tensor(labels[row][n], device=device) for row, n in chunk]
    padded = pad_sequence(ids, batch_first=True, padding_value=0)
    tokens, targets = padded[:, :-1], padded[:, 1:]
    lengths = torch.tensor([len(label) - 1 for label in ids], device=device)
    # Padding on the right needs no mask: no kept token attends to it.
    mask = torch.cat([prompts.mask[rows], torch.ones_like(tokens)], dim=1)
    logits = model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions_of(mask)[:, -tokens.shape[1] :],
        past_key_values=_selected(prefilled.cache, rows),
        use_cache=True,
        **prompts.continuation_inputs(rows, tokens.shape[1]),
    ).logits
    picked = log_softmax(logits.float(), dim=-1).gather(2, targets[..., None])[..., 0]
    kept = torch.arange(targets.shape[1], device=device) < lengths[:, None]
    return torch.where(kept, picked, 0.0).sum(dim=1).tolist()


def _selected(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A copy with the keys and values of `rows` (any,). Growing it does not change the prompts' cache."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(rows)
    return selected


def _chunks(items: Sequence[tuple[int, int]], size: int) -> Iterator[Sequence[tuple[int, int]]]:
    return (items[start : start + size] for start in range(0, len(items), size))
