"""Classification: the log-likelihood of each label after a prompt that is read once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

Labels = Sequence[Sequence[int]]

#: Inputs that are read with the prompt, and are in its keys and values from there on.
READ_ONCE = frozenset({"pixel_values", "pixel_attention_mask"})


@torch.inference_mode()
def label_log_likelihoods(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    labels: Sequence[Labels],
    max_tokens: int,
    beat: Callable[[], None],
) -> list[list[float]]:
    """The sum of the log-probabilities of each label's tokens, for each of a batch of prompts.

    `inputs` are the model's forward arguments for left-padded prompts (rows, length), `labels[row]` the token ids
    of the labels to choose from. At most about `max_tokens` keys and values are held at a time beside the prompts'.
    """
    positions = _positions(inputs["attention_mask"])
    prompt = model(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
    beat()
    first = log_softmax(prompt.logits[:, -1].float(), dim=-1)
    scores = _begun(first, labels)
    longer = [(row, n) for row, choices in enumerate(labels) for n, label in enumerate(choices) if len(label) > 1]
    longest = max((len(label) for choices in labels for label in choices), default=0)
    size = max(1, max_tokens // (inputs["input_ids"].shape[1] + longest))
    for chunk in _chunks(longer, size):
        likelihoods = _rest(model, inputs, prompt.past_key_values, chunk, labels)
        for (row, n), likelihood in zip(chunk, likelihoods, strict=True):
            scores[row][n] += likelihood
        beat()
    return scores


def _begun(likelihoods: Tensor, labels: Sequence[Labels]) -> list[list[float]]:
    """The log-likelihood of each label's first token, from those of all tokens after its prompt (rows, vocabulary)."""
    firsts = [torch.tensor([label[0] for label in choices], device=likelihoods.device) for choices in labels]
    picked = likelihoods.gather(1, pad_sequence(firsts, batch_first=True)).tolist()
    return [values[: len(choices)] for values, choices in zip(picked, labels, strict=True)]


def _rest(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    cache: DynamicCache,
    chunk: Sequence[tuple[int, int]],
    labels: Sequence[Labels],
) -> list[float]:
    """Log-likelihoods of the labels' tokens after their first, each label after its own prompt's cache."""
    device = inputs["input_ids"].device
    rows = torch.tensor([row for row, _ in chunk], device=device)
    ids = [torch.tensor(labels[row][n], device=device) for row, n in chunk]
    padded = pad_sequence(ids, batch_first=True, padding_value=0)
    tokens, targets = padded[:, :-1], padded[:, 1:]
    lengths = torch.tensor([len(label) - 1 for label in ids], device=device)
    own = {name: value[rows] for name, value in inputs.items() if name not in READ_ONCE}
    # Padding on the right needs no mask: no kept token looks at it.
    mask = torch.cat([own["attention_mask"], torch.ones_like(tokens)], dim=1)
    own |= {"input_ids": tokens, "attention_mask": mask, "position_ids": _positions(mask)[:, -tokens.shape[1] :]}
    if "image_attention_mask" in own:
        own["image_attention_mask"] = own["image_attention_mask"][:, -1:].expand(-1, tokens.shape[1], -1)
    logits = model(**own, past_key_values=_selected(cache, rows), use_cache=True).logits
    picked = log_softmax(logits.float(), dim=-1).gather(2, targets[..., None])[..., 0]
    kept = torch.arange(targets.shape[1], device=device) < lengths[:, None]
    return torch.where(kept, picked, 0.0).sum(dim=1).tolist()


def _positions(mask: Tensor) -> Tensor:
    """As `generate` counts them: padding on the left counts nothing."""
    return (mask.long().cumsum(dim=1) - 1).masked_fill(mask == 0, 1)


def _selected(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """The keys and values of some rows. A layer that grows gets new tensors, so the prompts' stay as they are."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(rows)
    return selected


def _chunks(items: Sequence[tuple[int, int]], size: int) -> Iterator[Sequence[tuple[int, int]]]:
    return (items[start : start + size] for start in range(0, len(items), size))
