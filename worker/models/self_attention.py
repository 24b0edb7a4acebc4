"""Self-attention of a batch's new tokens over a cache of slots: what the families' decoders have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from worker.engine.scoring import PROMPT
from worker.models.layers import Attend, DecoderLayer, KeysValues


@dataclass(frozen=True)
class SelfAttention:
    """Where new tokens are stored, and what they attend to."""

    #: (rows, length): their positions in the caches.
    positions: Tensor
    #: (rows, 1, length, keys): True where attended to.
    mask: Tensor
    #: (rows,): where the rows are not the slots in order.
    slots: Tensor | None = None
    #: (rows, any): the tokens whose states are asked for; None: all.
    selected: Tensor | None = None
    #: Nothing stands before them.
    only_new: bool = False

    def of_all(self) -> SelfAttention:
        """The same, with all tokens' states asked for."""
        return SelfAttention(self.positions, self.mask, self.slots, None, self.only_new)


def run_layer(
    layer: DecoderLayer,
    states: Tensor,
    rotary: KeysValues,
    cache: KeysValues,
    attention: SelfAttention,
    attend: Attend,
) -> Tensor:
    """Run a layer on new tokens: states (rows, length, hidden) to the same, or to those that `attention` selects (rows,
    selected, hidden). `cache`: keys and values (slots, key heads, positions, head size), where theirs are stored."""
    query, key, value = layer.query_keys_values(states, rotary)
    slots = torch.arange(states.shape[0], device=states.device) if attention.slots is None else attention.slots
    for kept, new in zip(cache, (key, value), strict=True):
        # Not kept[slots, :, positions] = ...: recorded, that keeps the number of rows.
        kept.transpose(1, 2).index_put_((slots[:, None], attention.positions), new.transpose(1, 2))
    mask = attention.mask
    if attention.selected is not None:
        states, query = picked(states, attention.selected), _picked_queries(query, attention.selected)
        mask = _picked_queries(mask, attention.selected)
    if attention.only_new:
        keys, values = key, value
    else:
        keys, values = cache if attention.slots is None else (kept.index_select(0, slots) for kept in cache)
    return layer.output(states, attend(query, keys, values, mask))


def causal_mask(positions: Tensor, keys: int, window: int | None = None) -> Tensor:
    """(rows, 1, length, keys): a token at one of `positions` (rows, length) attends to those up to itself, and with a
    sliding `window` to that many at most."""
    columns = torch.arange(keys, device=positions.device)
    mask = columns <= positions[..., None]
    if window is not None:
        mask = mask & (columns > positions[..., None] - window)
    return mask[:, None]


def tree_mask(starts: Tensor, owner: Tensor, depth: Tensor, keys: int, window: int | None = None) -> Tensor:
    """(rows, 1, length, keys): a token attends to what stands before `starts` (rows,), and of the new tokens to the
    prompt's and its own sequence's, up to itself. `owner` and `depth` are (rows, length): see engine/scoring.TokenTree.
    With a sliding `window`, it attends to that many at most, as if its sequence stood alone."""
    behind = torch.arange(keys, device=starts.device) - starts[:, None]
    column = behind.clamp(0, owner.shape[1] - 1)
    owners = owner.gather(1, column)[:, None]
    depths = depth.gather(1, column)[:, None]
    is_shared = (owners == PROMPT) | (owners == owner[..., None])
    is_new = ((behind >= 0) & (behind < owner.shape[1]))[:, None]
    is_before = (behind < 0)[:, None]
    mask = is_before | (is_new & is_shared & (depths <= depth[..., None]))
    if window is not None:
        mask = mask & (torch.where(is_before, behind[:, None], depths) > depth[..., None] - window)
    return mask[:, None]


def scored_places(lasts: Tensor, targets: Tensor, length: int) -> Tensor:
    """(rows, 1 + targets): of prompts with sequences behind them, the places whose next tokens are scored: the prompts'
    last tokens `lasts` (rows,), then the sequences'. `targets` (rows, targets); `length`: of all the new tokens."""
    places = lasts[:, None] + torch.arange(targets.shape[1] + 1, device=targets.device)
    return places.clamp(max=length - 1)


def scored(logits: Tensor, firsts: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities (rows, firsts and targets), given the logits (rows, 1 + targets, vocabulary) at
    `scored_places`: of `firsts` (rows, any) after each prompt, then of `targets` (rows, targets)."""
    likelihoods = logits.log_softmax(dim=-1)
    behind = likelihoods[:, 1:].gather(2, targets[..., None])[..., 0]
    return torch.cat((likelihoods[:, 0].gather(1, firsts), behind), dim=1)


def picked(states: Tensor, places: Tensor) -> Tensor:
    """Of states (rows, length, ...) those at `places` (rows, any): (rows, any, ...)."""
    return states[torch.arange(states.shape[0], device=states.device)[:, None], places]


def _picked_queries(tensor: Tensor, places: Tensor) -> Tensor:
    """Of a tensor (rows, heads, length, ...) the queries at `places` (rows, any): (rows, heads, any, ...)."""
    return picked(tensor.transpose(1, 2), places).transpose(1, 2)
