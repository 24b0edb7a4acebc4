"""IDEFICS' text decoder as functions of tensors alone: each of them is recorded as one graph (worker/models/traced.py).

The arithmetic is that of transformers' `modeling_idefics.py`. Everywhere, `ids` (rows, length) are new tokens, `starts`
(rows,) how many stand before them, and `caches` the keys and values (rows, heads, positions, head size) of each layer
in turn, with room for the new ones, which are stored there; then those of each image block, for the image that the
tokens after a prompt see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import IdeficsForVisionText2Text
from transformers.models.idefics.modeling_idefics import apply_rotary_pos_emb

KeysValues = tuple[Tensor, Tensor]
#: One of transformers' layers, which are not typed.
Block = Any


class _Network(torch.nn.Module):
    """Layers with an image block before every few of them, between an embedding and a head."""

    def __init__(self, model: IdeficsForVisionText2Text) -> None:
        super().__init__()
        inner: Block = model.model
        self.embedding: Block = inner.embed_tokens
        self.rotary: Block = inner.layers[0].self_attn.rotary_emb
        self.layers: Block = inner.layers
        self.blocks: Block = inner.gated_cross_attn_layers
        self.norm: Block = inner.norm
        self.head: Block = model.lm_head
        self.interval: int = model.config.cross_layer_interval

    def states(
        self,
        ids: Tensor,
        stored: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        caches: Sequence[Tensor],
        look: Callable[[Block, Tensor, KeysValues | None], Tensor],
    ) -> Tensor:
        """The tokens' last states (rows, length, hidden). `stored` and `positions` (rows, length) are their places in
        the caches and in the text; `look` is what an image block does, with its own keys and values if there are any.
        """
        pairs = list(zip(caches[::2], caches[1::2], strict=True))
        own, cross = pairs[: len(self.layers)], pairs[len(self.layers) :]
        states: Tensor = self.embedding(ids)
        rotary = self.rotary(states, positions)
        rows = torch.arange(ids.shape[0], device=ids.device)[:, None]
        for index, layer in enumerate(self.layers):
            if index % self.interval == 0:
                number = index // self.interval
                states = look(self.blocks[number], states, cross[number] if cross else None)
            states = _attend(layer, states, rotary, *own[index], rows, stored, mask)
        return states

    def logits(self, states: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(states))
        return logits.float()


class Reader(_Network):
    """Reads prompts that show images."""

    def __init__(self, model: IdeficsForVisionText2Text, image_id: int, *, begins: bool) -> None:
        """`begins`: nothing stands before any of them."""
        super().__init__(model)
        self.image_id = image_id
        self.begins = begins

    def forward(
        self,
        ids: Tensor,
        starts: Tensor,
        lasts: Tensor,
        images: Tensor,
        shown: Tensor,
        kept: Tensor,
        unseeing: Tensor,
        *caches: Tensor,
    ) -> Tensor:
        """The logits (rows, vocabulary) after each row's last token, which `lasts` (rows,) says.

        `images` (images, width, size) are features; `shown` (rows, most) which of them a row shows, the one before its
        new tokens first; `kept` (rows,) which one the tokens after the prompt see; `unseeing` (rows,) whether there is
        none before the new tokens.
        """
        stored = starts[:, None] + torch.arange(ids.shape[1], device=ids.device)
        seen = (ids == self.image_id).cumsum(dim=1)
        blind = ((seen == 0) & unseeing[:, None])[..., None]
        keys = torch.arange(shown.shape[1] * images.shape[1], device=ids.device)
        # Each token sees the image before it.
        looks = (seen[..., None] == keys // images.shape[1])[:, None]

        def look(block: Block, states: Tensor, cache: KeysValues | None) -> Tensor:
            assert cache is not None, "a prompt shows an image"
            return _look(block, states, images, shown, kept, looks, blind, *cache)

        mask = None if self.begins else _up_to(stored, caches[0])
        states = self.states(ids, stored, stored, mask, caches, look)
        return self.logits(_picked(states, lasts))


class Continuation(_Network):
    """Goes on with tokens that show no image: they see their row's last one."""

    def forward(self, ids: Tensor, starts: Tensor, lasts: Tensor, sees: Tensor, *caches: Tensor) -> Tensor:
        """The logits (rows, vocabulary) after each row's last token, which `lasts` (rows,) says. `sees` (rows,):
        whether it has an image. Without any, the image blocks' caches may be left out."""
        stored = starts[:, None] + torch.arange(ids.shape[1], device=ids.device)
        states = self.states(ids, stored, stored, _up_to(stored, caches[0]), caches, _looker_back(sees))
        return self.logits(_picked(states, lasts))


class Branches(_Network):
    """Goes on with several texts side by side (tree attention: Miao et al., "SpecInfer", 2023)."""

    def forward(
        self, ids: Tensor, starts: Tensor, targets: Tensor, owner: Tensor, depth: Tensor, sees: Tensor, *caches: Tensor
    ) -> Tensor:
        """The log-probabilities (rows, length) of `targets` (rows, length), the tokens that follow. `owner` and `depth`
        (rows, length) say which text a token is of, and its place there."""
        count = ids.shape[1]
        stored = starts[:, None] + torch.arange(count, device=ids.device)
        every = torch.arange(caches[0].shape[2], device=ids.device)
        behind = every - starts[:, None]
        column = behind.clamp(0, count - 1)
        same = owner.gather(1, column)[:, None] == owner[..., None]
        reached = depth.gather(1, column)[:, None] <= depth[..., None]
        inside = ((behind >= 0) & (behind < count))[:, None]
        mask = ((behind < 0)[:, None] | (same & reached & inside))[:, None]
        states = self.states(ids, stored, starts[:, None] + depth, mask, caches, _looker_back(sees))
        return self.logits(states).log_softmax(dim=-1).gather(2, targets[..., None])[..., 0]


def move(sources: Tensor, targets: Tensor, *tensors: Tensor) -> Tensor:
    """Put some rows' content in others' places."""
    for tensor in tensors:
        tensor.index_copy_(0, targets, tensor.index_select(0, sources))
    return targets


def _up_to(stored: Tensor, keys: Tensor) -> Tensor:
    """(rows, 1, length, positions): a token sees those up to itself."""
    return (torch.arange(keys.shape[2], device=stored.device) <= stored[..., None])[:, None]


def _picked(states: Tensor, lasts: Tensor) -> Tensor:
    return states[torch.arange(states.shape[0], device=states.device), lasts]


def _looker_back(sees: Tensor) -> Callable[[Block, Tensor, KeysValues | None], Tensor]:
    blind = ~sees[:, None, None]

    def look(block: Block, states: Tensor, kept: KeysValues | None) -> Tensor:
        return _look_back(block, states, blind, kept)

    return look


def _attend(
    layer: Block,
    states: Tensor,
    rotary: KeysValues,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    stored: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """The text's own attention. `keys` and `values` (rows, heads, positions, head size) take in the new tokens'."""
    attention = layer.self_attn
    normed = layer.input_layernorm(states)
    query, key = (_headed(attention, project(normed)) for project in (attention.q_proj, attention.k_proj))
    value = _headed(attention, attention.v_proj(normed))
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    for cache, new in ((keys, key), (values, value)):
        # Not cache[rows, :, stored] = ...: recorded, that keeps the number of rows.
        cache.transpose(1, 2).index_put_((rows, stored), new.transpose(1, 2))
    if mask is None:
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
    else:
        attended = scaled_dot_product_attention(query, keys, values, mask)
    states = states + attention.o_proj(_joined(attended))
    mixed: Tensor = states + layer.mlp(layer.post_attention_layernorm(states))
    return mixed


def _look(
    block: Block,
    states: Tensor,
    images: Tensor,
    shown: Tensor,
    kept: Tensor,
    looks: Tensor,
    blind: Tensor,
    kept_keys: Tensor,
    kept_values: Tensor,
) -> Tensor:
    """While prompts are read each token sees the image before it. The last one's keys and values are kept."""
    attention = block.cross_attn
    keys, values = (_headed(attention, project(images)) for project in (attention.k_proj, attention.v_proj))
    keys = attention.k_layer_norm(keys) if attention.qk_layer_norms else keys
    kept_keys.copy_(keys[kept])
    kept_values.copy_(values[kept])
    attended = scaled_dot_product_attention(
        _query(block, states), _side_by_side(keys, shown), _side_by_side(values, shown), looks
    )
    return _gated(block, states, attended, blind)


def _side_by_side(images: Tensor, shown: Tensor) -> Tensor:
    """(images, heads, length, head size) as (rows, heads, keys, head size) of each row's images."""
    each = images[shown].transpose(1, 2)
    return each.flatten(2, 3)


def _look_back(block: Block, states: Tensor, blind: Tensor, kept: KeysValues | None) -> Tensor:
    """After the prompt every token sees its row's last image, whose keys and values are kept."""
    if kept is None:
        return _mixed(block, states)
    keys, values = kept
    return _gated(block, states, scaled_dot_product_attention(_query(block, states), keys, values), blind)


def _headed(attention: Block, states: Tensor) -> Tensor:
    """(rows, length, hidden) as (rows, heads, length, head size)."""
    headed: Tensor = states.view(*states.shape[:2], attention.num_heads, attention.head_dim).transpose(1, 2)
    return headed


def _joined(states: Tensor) -> Tensor:
    return states.transpose(1, 2).flatten(2)


def _query(block: Block, states: Tensor) -> Tensor:
    attention = block.cross_attn
    query = _headed(attention, attention.q_proj(block.input_layernorm(states)))
    return attention.q_layer_norm(query) if attention.qk_layer_norms else query


def _gated(block: Block, states: Tensor, attended: Tensor, blind: Tensor | None) -> Tensor:
    added = block.cross_attn.o_proj(_joined(attended))
    if blind is not None:
        added = added.masked_fill(blind, 0.0)
    return _mixed(block, states + block.act_cross_attn(block.alpha_cross_attn) * added)


def _mixed(block: Block, states: Tensor) -> Tensor:
    mixed: Tensor = states + block.act_dense(block.alpha_dense) * block.mlp(block.post_attention_layernorm(states))
    return mixed
