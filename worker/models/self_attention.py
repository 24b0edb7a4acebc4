"""Self-attention of a batch's new tokens over a K/V cache in slots or in blocks; shared by the families' decoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from worker.engine.scoring import PROMPT
from worker.engine.traced import TABLE_DIMENSIONS
from worker.models.layers import Attend, CosSin, DecoderLayer, KeysValues, causal_mask
from worker.models.paged_attention import PagedRows, can_page, paged_attention


class Places(Protocol):
    """The new tokens' places in a batch's K/V cache. `cache`: a layer's keys and values there."""

    def store(self, cache: KeysValues, new: KeysValues) -> None:
        """Write the new tokens' keys and values, each (rows, key heads, length, head size)."""

    def load(self, cache: KeysValues) -> KeysValues:
        """The keys and values of the rows, each (rows, key heads, keys, head size)."""


class SlotPlaces(NamedTuple):
    """Places in slots: keys and values (slots, key heads, positions, head size)."""

    #: (rows, length): the tokens' positions in their rows.
    positions: Tensor
    #: (rows, 1): the slot of each row.
    row_slots: Tensor
    #: (rows,): the same; None: row n is in slot n, so that the caches are read where they are.
    slots: Tensor | None

    @classmethod
    def of(cls, positions: Tensor, slots: Tensor | None) -> SlotPlaces:
        """The places of tokens at `positions` (rows, length) in `slots` (rows,); None: row n is in slot n."""
        row_slots = torch.arange(positions.shape[0], device=positions.device) if slots is None else slots
        return cls(positions, row_slots[:, None], slots)

    def store(self, cache: KeysValues, new: KeysValues) -> None:
        """Write the new tokens' keys and values, each (rows, key heads, length, head size)."""
        for kept, each in zip(cache, new, strict=True):
            # Not kept[slots, :, positions] = ...: in a recorded graph, that would fix the number of rows.
            kept.transpose(1, 2).index_put_((self.row_slots, self.positions), each.transpose(1, 2))

    def load(self, cache: KeysValues) -> KeysValues:
        """The keys and values of the rows, each (rows, key heads, positions, head size)."""
        if self.slots is None:
            return cache
        keys, values = (kept.index_select(0, self.slots) for kept in cache)
        return keys, values


class BlockPlaces(NamedTuple):
    """Places in blocks: keys and values (blocks, block tokens, key heads, head size)."""

    #: (rows, width): the blocks of each row.
    table: Tensor
    #: (rows, length): the block of each token, and the token's index in it.
    blocks: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, table: Tensor, positions: Tensor, block_tokens: int) -> BlockPlaces:
        """The places of tokens at `positions` (rows, length) of rows with the block table `table` (rows, width)."""
        blocks = table.gather(1, positions // block_tokens)
        # What would be written to the null block goes to the last one.
        return cls(table, blocks - (blocks == 0).long(), positions % block_tokens)

    def store(self, cache: KeysValues, new: KeysValues) -> None:
        """Write the new tokens' keys and values, each (rows, key heads, length, head size)."""
        for kept, each in zip(cache, new, strict=True):
            kept.index_put_((self.blocks, self.offsets), each.transpose(1, 2))

    def load(self, cache: KeysValues) -> KeysValues:
        """Copies of the rows' keys and values, each (rows, key heads, width * block tokens, head size)."""
        keys, values = (kept[self.table].flatten(1, 2).transpose(1, 2) for kept in cache)
        return keys, values


class Caches(NamedTuple):
    """A batch's caches in either layout, as interfaces.Decoder describes them."""

    #: (rows, width): the rows' block table; None in slots.
    table: Tensor | None
    #: The keys and values of each layer in turn, then those of the extra pools' layers.
    layers: list[KeysValues]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Caches:
        """`tensors`: the self-attention's caches, then the extra pools."""
        has_table = tensors[0].dim() == TABLE_DIMENSIONS
        rest = tensors[has_table:]
        return cls(tensors[0] if has_table else None, list(zip(rest[::2], rest[1::2], strict=True)))

    @property
    def keys(self) -> int:
        """Number of keys of a row."""
        keys = self.layers[0][0]
        return keys.shape[2] if self.table is None else self.table.shape[1] * keys.shape[1]

    def paged(self, positions: Tensor, window: int | None) -> PagedRows | None:
        """For torch's paged kernel: rows with consecutive new tokens at `positions` (rows, queries), the last of which
        is each row's last; None if the kernel does not run here. `window`: see layers.causal_mask."""
        keys = self.layers[0][0]
        if self.table is None or not can_page(keys.device, keys.dtype, keys.shape[3], keys.shape[1]):
            return None
        return PagedRows.of(self.table, positions[:, -1] + 1, positions.shape[1], window)

    def places(self, positions: Tensor, slots: Tensor | None = None) -> Places:
        """The places of tokens at `positions` (rows, length) of their rows. `slots` (rows,): the slots of the rows,
        unless there is a block table; None: row n is in slot n."""
        if self.table is None:
            return SlotPlaces.of(positions, slots)
        return BlockPlaces.of(self.table, positions, self.layers[0][0].shape[1])


@dataclass(frozen=True)
class SelfAttention:
    """Where the keys and values of new tokens are stored, and what the tokens attend to."""

    places: Places
    #: (rows, 1, queries, keys): True where a token attends to a key; None for torch's paged kernel.
    mask: Tensor | None
    paged: PagedRows | None = None
    #: True if no row has tokens before the new ones, so that the caches need not be read.
    only_new: bool = False
    #: (rows, selected): indices of the tokens whose states are computed; None: all.
    selected: Tensor | None = None
    #: The same, but with the states of all tokens; None if it has them.
    whole: SelfAttention | None = None

    def of_all(self) -> SelfAttention:
        """The same, but with the states of all tokens."""
        return self.whole or self

    def at(self, selected: Tensor, paged: PagedRows | None = None) -> SelfAttention:
        """The same, but with the states of the tokens at `selected` (rows, selected) only. `paged`: for these."""
        mask = None if self.mask is None else _queries_at(self.mask, selected)
        return SelfAttention(self.places, mask, paged, self.only_new, selected, self)

    def attended(self, query: Tensor, new: KeysValues, cache: KeysValues, attend: Attend) -> Tensor:
        """The result of attention for `query`, in its shape (rows, heads, queries, head size). `new`: the new tokens'
        keys and values, which are in `cache` already."""
        if self.paged is not None:
            return paged_attention(query, *cache, self.paged)
        keys, values = new if self.only_new else self.places.load(cache)
        return attend(query, keys, values, self.mask)


def causal_attention(
    caches: Caches,
    positions: Tensor,
    *,
    window: int | None = None,
    slots: Tensor | None = None,
    lasts: Tensor | None = None,
    only_new: bool = False,
) -> SelfAttention:
    """Attention of consecutive new tokens at `positions` (rows, length) to the tokens up to themselves.

    `window`: see layers.causal_mask. `slots`: see Caches.places. `lasts` (rows,): the index of the only token of each
    row whose state the last layer computes; None: of all. `only_new`: whether no row has tokens before the new ones.
    """
    length = positions.shape[1]
    places, paged = caches.places(positions, slots), caches.paged(positions, window)
    mask = causal_mask(positions, length if only_new else caches.keys, window) if paged is None else None
    whole = SelfAttention(places, mask, paged, only_new)
    if lasts is None:
        return whole
    selected = lasts[:, None]
    return whole.at(selected, paged and caches.paged(positions.gather(1, selected), window))


def run_layer(
    layer: DecoderLayer,
    states: Tensor,
    rotary: CosSin,
    cache: KeysValues,
    attention: SelfAttention,
    attend: Attend,
) -> Tensor:
    """Run a layer on new tokens and store their keys and values in `cache`.

    From `states` (rows, length, hidden) to the same shape, or to (rows, selected, hidden) if `attention` selects some.
    `cache`: the layer's keys and values, in either layout. `rotary`: see layers.rotary_cos_sin.
    """
    query, key, value = layer.query_keys_values(states, rotary)
    attention.places.store(cache, (key, value))
    if attention.selected is not None:
        states, query = states_at(states, attention.selected), _queries_at(query, attention.selected)
    return layer.output(states, attention.attended(query, (key, value), cache, attend))


def new_positions(starts: Tensor, ids: Tensor) -> Tensor:
    """(rows, length): the positions in the caches of new tokens `ids` (rows, length), after `starts` (rows,) tokens."""
    return starts[:, None] + torch.arange(ids.shape[1], device=ids.device)


def tree_mask(starts: Tensor, owner: Tensor, depth: Tensor, keys: int, window: int | None = None) -> Tensor:
    """The mask (rows, 1, length, keys) of a TokenTree's tokens after `starts` (rows,) tokens of each row.

    A token attends to all tokens before the new ones, and among the new ones to those of the prompt and of its own
    sequence, up to itself. With a sliding window it attends to the last `window` of these. `owner` and `depth` (rows,
    length): see engine/scoring.TokenTree.
    """
    offsets = torch.arange(keys, device=starts.device) - starts[:, None]
    column = offsets.clamp(0, owner.shape[1] - 1)
    owners = owner.gather(1, column)[:, None]
    depths = depth.gather(1, column)[:, None]
    is_shared = (owners == PROMPT) | (owners == owner[..., None])
    is_new = ((offsets >= 0) & (offsets < owner.shape[1]))[:, None]
    is_before = (offsets < 0)[:, None]
    mask = is_before | (is_new & is_shared & (depths <= depth[..., None]))
    if window is not None:
        mask = mask & (torch.where(is_before, offsets[:, None], depths) > depth[..., None] - window)
    return mask[:, None]


def scored_places(lasts: Tensor, targets: Tensor, length: int) -> Tensor:
    """Indices (rows, 1 + targets) of the new tokens whose next tokens are scored: the prompt's last token, at `lasts`
    (rows,), then the tokens of the sequences after it. `targets` (rows, targets): see engine/scoring.TokenTree.
    `length`: number of new tokens."""
    places = lasts[:, None] + torch.arange(targets.shape[1] + 1, device=targets.device)
    return places.clamp(max=length - 1)


def prompt_scores(logits: Tensor, firsts: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities (rows, firsts + targets) of each of `firsts` (rows, firsts) right after the prompt, then of
    `targets` (rows, targets), from the logits (rows, 1 + targets, vocabulary) at `scored_places`."""
    likelihoods = logits.log_softmax(dim=-1)
    after = likelihoods[:, 1:].gather(2, targets[..., None])[..., 0]
    return torch.cat((likelihoods[:, 0].gather(1, firsts), after), dim=1)


def target_scores(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities (rows, length) of `targets` (rows, length), from the logits (rows, length, vocabulary) of the
    tokens before them."""
    return logits.log_softmax(dim=-1).gather(2, targets[..., None])[..., 0]


def states_at(states: Tensor, places: Tensor) -> Tensor:
    """The states (rows, selected, ...) of `states` (rows, length, ...) at the indices `places` (rows, selected)."""
    return states[torch.arange(states.shape[0], device=states.device)[:, None], places]


def _queries_at(tensor: Tensor, places: Tensor) -> Tensor:
    """The queries (rows, heads, selected, ...) of `tensor` (rows, heads, length, ...) at the indices `places` (rows,
    selected)."""
    return states_at(tensor.transpose(1, 2), places).transpose(1, 2)
