"""IDEFICS' text decoder with a cache of slots, so that rows join and leave at any step.

The arithmetic is that of transformers' `modeling_idefics.py`; three things are kept that it computes again at each
step: the cross-attention's keys and values (once per image), and, after the prompt, only those of the image that new
tokens still attend to (each token sees the image before it, and no other).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import IdeficsForVisionText2Text
from transformers.models.idefics.modeling_idefics import apply_rotary_pos_emb

#: Positions that a cache grows by: often enough to be small, seldom enough for its copies not to count.
GROWTH = 64

KeysValues = tuple[Tensor, Tensor]
#: One of transformers' layers, which are not typed.
Block = Any


class SlotCache:
    """Keys and values (slots, heads, capacity, head size) of each layer. Slots 0 to n-1 are in use."""

    def __init__(self, layers: int) -> None:
        self._layers: list[KeysValues | None] = [None] * layers

    def layer(self, index: int) -> KeysValues:
        kept = self._layers[index]
        assert kept is not None, "nothing was written yet"
        return kept

    def reserve(self, index: int, slots: int, like: Tensor, capacity: int) -> KeysValues:
        """A layer's tensors with room for so many slots and positions; what they hold stays."""
        kept = self._layers[index]
        if kept is not None and kept[0].shape[0] >= slots and kept[0].shape[2] >= capacity:
            return kept
        rows = max(slots, kept[0].shape[0] if kept else 0)
        room = max(-(-capacity // GROWTH) * GROWTH, kept[0].shape[2] if kept else 0)
        grown = tuple(like.new_zeros(rows, like.shape[1], room, like.shape[3]) for _ in range(2))
        if kept is not None:
            for new, old in zip(grown, kept, strict=True):
                new[: old.shape[0], :, : old.shape[2]] = old
        self._layers[index] = grown[0], grown[1]
        return grown[0], grown[1]

    def move(self, source: int, target: int) -> None:
        """Put one slot's content in another's place."""
        for kept in self._layers:
            if kept is not None:
                for tensor in kept:
                    tensor[target] = tensor[source]


class IdeficsDecoder:
    """Prompts and steps for rows in slots. All rows of a call are at their own positions."""

    def __init__(self, model: IdeficsForVisionText2Text) -> None:
        self._model = model.model
        self._head = model.lm_head
        self._interval: int = model.config.cross_layer_interval
        self._rotary = model.model.layers[0].self_attn.rotary_emb
        self._self_cache = SlotCache(len(model.model.layers))
        self._cross_cache = SlotCache(len(model.model.gated_cross_attn_layers))
        self._device = model.device
        #: Keys of one image: the resampler's latents, or the vision tower's patches.
        self._width = 0
        #: (slots,) tokens that each slot holds, and whether its row shows an image.
        self._lengths: list[int] = []
        self._sees: list[bool] = []

    @property
    def rows(self) -> int:
        return len(self._lengths)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], images: Sequence[Sequence[Tensor]], image_id: int) -> Tensor:
        """Read prompts into the next free slots, in order. Their next token's logits (prompts, vocabulary).

        `images[row]` are the features (length, width) of the row's images, in the order of its image tokens.
        """
        length = max(map(len, prompts))
        ids = torch.zeros(len(prompts), length, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            # Padding on the right: causal attention never sees it.
            ids[row, : len(prompt)] = torch.tensor(prompt)
        seen = (ids == image_id).cumsum(dim=1)
        ids, seen = ids.to(self._device), seen.to(self._device)
        first, count = self.rows, len(prompts)
        states = self._model.embed_tokens(ids)
        rotary = self._rotary(states, torch.arange(length, device=self._device)[None])
        shown = _Shown(images, seen, states)
        for index, layer in enumerate(self._model.layers):
            if index % self._interval == 0:
                states = self._cross_prefill(index // self._interval, states, shown, first)
            states = self._self_prefill(index, layer, states, rotary, first)
        self._lengths += map(len, prompts)
        self._sees += [bool(row) for row in images]
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self._device)
        return self._logits(states[torch.arange(count, device=self._device), last])

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each slot. The next token's logits (slots, vocabulary)."""
        lengths = torch.tensor(self._lengths, device=self._device)
        states = self._model.embed_tokens(torch.tensor(tokens, device=self._device)[:, None])
        rotary = self._rotary(states, lengths[:, None])
        longest = max(self._lengths) + 1
        mask = (torch.arange(longest, device=self._device) <= lengths[:, None])[:, None, None, :]
        blind = None if all(self._sees) else ~torch.tensor(self._sees, device=self._device)[:, None, None]
        for index, layer in enumerate(self._model.layers):
            if index % self._interval == 0:
                states = self._cross_step(index // self._interval, states, blind)
            states = self._self_step(index, layer, states, rotary, lengths, mask)
        self._lengths = [length + 1 for length in self._lengths]
        return self._logits(states[:, 0])

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """Free a slot: the last row in use moves into it."""
        last = self.rows - 1
        if slot != last:
            self._self_cache.move(last, slot)
            self._cross_cache.move(last, slot)
            self._lengths[slot], self._sees[slot] = self._lengths[last], self._sees[last]
        del self._lengths[last], self._sees[last]

    def clear(self) -> None:
        """Free all slots; their memory stays for the next rows."""
        self._lengths.clear()
        self._sees.clear()

    def _logits(self, states: Tensor) -> Tensor:
        logits: Tensor = self._head(self._model.norm(states))
        return logits.float()

    # The text's own attention

    def _self_prefill(self, index: int, layer: Block, states: Tensor, rotary: KeysValues, first: int) -> Tensor:
        attention = layer.self_attn
        query, key, value = _projected(attention, layer.input_layernorm(states))
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        end, length = first + len(states), states.shape[1]
        kept = self._self_cache.reserve(index, end, key, length + 1)
        for cache, new in zip(kept, (key, value), strict=True):
            cache[first:end, :, :length] = new
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        return _mixed(layer, states + attention.o_proj(_joined(attended)))

    def _self_step(
        self, index: int, layer: Block, states: Tensor, rotary: KeysValues, lengths: Tensor, mask: Tensor
    ) -> Tensor:
        attention = layer.self_attn
        query, key, value = _projected(attention, layer.input_layernorm(states))
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        rows, longest = len(states), mask.shape[-1]
        keys, values = self._self_cache.reserve(index, rows, key, longest)
        slots = torch.arange(rows, device=self._device)
        keys[slots, :, lengths], values[slots, :, lengths] = key[:, :, 0], value[:, :, 0]
        attended = scaled_dot_product_attention(query, keys[:rows, :, :longest], values[:rows, :, :longest], mask)
        return _mixed(layer, states + attention.o_proj(_joined(attended)))

    # The gated attention to images

    def _cross_prefill(self, index: int, states: Tensor, shown: _Shown, first: int) -> Tensor:
        block = self._model.gated_cross_attn_layers[index]
        if shown.distinct is None:
            return _mixed_cross(block, states)
        keys, values = _image_keys_values(block.cross_attn, shown.distinct)
        self._width = keys.shape[2]
        end = first + len(states)
        kept = self._cross_cache.reserve(index, end, keys, keys.shape[2])
        for cache, new in zip(kept, (keys, values), strict=True):
            cache[first:end, :, : new.shape[2]] = new[shown.last]
        query = _query(block.cross_attn, block.input_layernorm(states))
        attended = scaled_dot_product_attention(query, shown.side_by_side(keys), shown.side_by_side(values), shown.mask)
        return _gated(block, states, attended, shown.blind)

    def _cross_step(self, index: int, states: Tensor, blind: Tensor | None) -> Tensor:
        block = self._model.gated_cross_attn_layers[index]
        if not any(self._sees):
            return _mixed_cross(block, states)
        keys, values = self._cross_cache.layer(index)
        query = _query(block.cross_attn, block.input_layernorm(states))
        rows = slice(len(states))
        attended = scaled_dot_product_attention(query, keys[rows, :, : self._width], values[rows, :, : self._width])
        return _gated(block, states, attended, blind)


class _Shown:
    """The images of a batch of prompts, laid out for the cross-attention of one prefill."""

    def __init__(self, images: Sequence[Sequence[Tensor]], seen: Tensor, like: Tensor) -> None:
        """`seen` (rows, length) counts the image tokens up to each token."""
        distinct = {id(image): image for row in images for image in row}
        places = {key: place for place, key in enumerate(distinct)}
        most = max(1, *map(len, images))
        index = [[places[id(image)] for image in row] + [0] * (most - len(row)) for row in images]
        last = [places[id(row[-1])] if row else 0 for row in images]
        self._index = torch.tensor(index, device=like.device)
        #: (images, length, width) of each distinct image once; None where no row shows one.
        self.distinct = torch.stack(list(distinct.values())).to(like) if distinct else None
        #: (rows,) which of them each row's new tokens attend to.
        self.last = torch.tensor(last, device=like.device)
        #: (rows, length, 1): tokens before any image.
        self.blind = (seen == 0)[..., None]
        width = 0 if self.distinct is None else self.distinct.shape[1]
        image_of_key = torch.arange(1, most + 1, device=like.device).repeat_interleave(width)
        #: (rows, 1, length, keys): each token attends to the image before it.
        self.mask = (seen[..., None] == image_of_key)[:, None]

    def side_by_side(self, kept: Tensor) -> Tensor:
        """(images, heads, length, head size) as (rows, heads, keys, head size)."""
        each = kept[self._index]
        rows, images, heads, length, size = each.shape
        return each.transpose(1, 2).reshape(rows, heads, images * length, size)


def _projected(attention: Block, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (
        _headed(attention, projection(states)) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return query, key, value


def _query(attention: Block, states: Tensor) -> Tensor:
    query = _headed(attention, attention.q_proj(states))
    return attention.q_layer_norm(query) if attention.qk_layer_norms else query


def _image_keys_values(attention: Block, features: Tensor) -> KeysValues:
    keys = _headed(attention, attention.k_proj(features))
    values = _headed(attention, attention.v_proj(features))
    return (attention.k_layer_norm(keys) if attention.qk_layer_norms else keys), values


def _headed(attention: Block, states: Tensor) -> Tensor:
    """(rows, length, hidden) as (rows, heads, length, head size)."""
    headed: Tensor = states.view(*states.shape[:2], attention.num_heads, attention.head_dim).transpose(1, 2)
    return headed


def _joined(states: Tensor) -> Tensor:
    return states.transpose(1, 2).flatten(2)


def _mixed(layer: Block, states: Tensor) -> Tensor:
    mixed: Tensor = states + layer.mlp(layer.post_attention_layernorm(states))
    return mixed


def _gated(block: Block, states: Tensor, attended: Tensor, blind: Tensor | None) -> Tensor:
    added = block.cross_attn.o_proj(_joined(attended))
    if blind is not None:
        added = added.masked_fill(blind, 0.0)
    return _mixed_cross(block, states + block.act_cross_attn(block.alpha_cross_attn) * added)


def _mixed_cross(block: Block, states: Tensor) -> Tensor:
    mixed: Tensor = states + block.act_dense(block.alpha_dense) * block.mlp(block.post_attention_layernorm(states))
    return mixed
