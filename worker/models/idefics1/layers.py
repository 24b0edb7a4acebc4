"""IDEFICS' text decoder, layer by layer, with less to call than transformers has.

On a batch of small products a call costs as much as it computes, on a GPU as on a CPU. So layers of one input are one,
and what does not change is computed once. The arithmetic is that of transformers' `modeling_idefics.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, scaled_dot_product_attention
from transformers import IdeficsForVisionText2Text
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledEmbedding, IdeficsDecoupledLinear

#: Keys and values, or cosines and sines.
KeysValues = tuple[Tensor, Tensor]
#: One of transformers' modules, which are not typed.
Block = Any


#: Layers without a bias, which are fused by their weights alone.
_PLAIN = (torch.nn.Linear, IdeficsDecoupledLinear)
#: Scaled dot-product attention of queries, keys and values (rows, heads, length, head size), with a mask that is True
#: where attended to: (rows, heads, queries, head size).
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def eager_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention operation by operation: for a few queries, torch's fused kernel takes up to a half longer on a CPU.

    `query` (rows, heads, queries, head size), `keys` and `values` (rows, heads, keys, head size), `mask` (rows, 1 or
    heads, queries, keys); the result has the query's shape.
    """
    scores = torch.matmul(query * query.shape[-1] ** -0.5, keys.transpose(-1, -2))
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf)
    return torch.matmul(scores.softmax(dim=-1), values)


class FusedLinear(torch.nn.Module):
    """Linear layers of one input as one: their outputs follow one another in the last dimension."""

    weight: Tensor | None

    def __init__(self, *layers: Block) -> None:
        super().__init__()
        # Others (quantized ones, for example) run one by one.
        are_plain = all(type(layer) in _PLAIN and layer.bias is None for layer in layers)
        self.register_buffer("weight", _concatenated([layer.weight for layer in layers]) if are_plain else None)
        self.layers = torch.nn.ModuleList([] if are_plain else layers)

    def forward(self, states: Tensor) -> Tensor:
        """(..., inputs) to (..., all outputs)."""
        if self.weight is None:
            return torch.cat([layer(states) for layer in self.layers], dim=-1)
        return linear(states, self.weight)


def _concatenated(parameters: Sequence[torch.nn.Parameter]) -> Tensor:
    """Parameters (outputs, inputs) as one tensor (all outputs, inputs), whose parts they become: no copy stays."""
    whole = torch.cat([parameter.data for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = whole[start : start + len(parameter)]
        start += len(parameter)
    return whole


class _RMSNorm(torch.nn.Module):
    """Root mean square normalization (Zhang and Sennrich, 2019), in half of torch's operations."""

    eps: Tensor

    def __init__(self, norm: Block) -> None:
        super().__init__()
        self.weight = norm.weight
        self.register_buffer("eps", torch.tensor(norm.variance_epsilon, device=norm.weight.device))

    def forward(self, states: Tensor) -> Tensor:
        """(..., size) to the same."""
        exact = states.float()
        squares = torch.linalg.vecdot(exact, exact)[..., None]
        scale = torch.add(self.eps, squares, alpha=1 / states.shape[-1]).rsqrt()
        normed: Tensor = (states * scale).to(self.weight.dtype) * self.weight
        return normed


class _Mlp(torch.nn.Module):
    """A gated MLP, its first two layers fused."""

    def __init__(self, mlp: Block) -> None:
        super().__init__()
        self.gate_and_up = FusedLinear(mlp.gate_proj, mlp.up_proj)
        self.act = mlp.act_fn
        self.down = mlp.down_proj

    def forward(self, states: Tensor) -> Tensor:
        """(rows, length, hidden) to the same."""
        gate, up = self.gate_and_up(states).chunk(2, dim=-1)
        output: Tensor = self.down(self.act(gate) * up)
        return output


class _AttentionBlock(torch.nn.Module):
    """What both kinds of layers have: two norms, the attention's output projection, and an MLP."""

    def __init__(self, layer: Block, attention: Block) -> None:
        super().__init__()
        self.heads: int = attention.num_heads
        self.input_norm = _RMSNorm(layer.input_layernorm)
        self.post_attention_norm = _RMSNorm(layer.post_attention_layernorm)
        self.out = attention.o_proj
        self.mlp = _Mlp(layer.mlp)


class DecoderLayer(_AttentionBlock):
    """Self-attention, then an MLP."""

    def __init__(self, layer: Block) -> None:
        attention = layer.self_attn
        super().__init__(layer, attention)
        self.project = FusedLinear(attention.q_proj, attention.k_proj, attention.v_proj)

    def query_keys_values(self, states: Tensor, rotary: KeysValues) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (rows, heads, length, head size), of states (rows, length, hidden). `rotary`
        is that of `TextModel.rotary_cos_sin`."""
        split = _split_heads(self.project(self.input_norm(states)), 3 * self.heads)
        rotated, value = split[:, : 2 * self.heads], split[:, 2 * self.heads :]
        cosine, sine = rotary
        rotated = rotated * cosine + rotated.roll(rotated.shape[-1] // 2, dims=-1) * sine
        return rotated[:, : self.heads], rotated[:, self.heads :], value

    def output(self, states: Tensor, attended: Tensor) -> Tensor:
        """The states after the layer (rows, length, hidden), from those before it and the attention's result (rows,
        heads, length, head size)."""
        states = states + self.out(_merge_heads(attended))
        output: Tensor = states + self.mlp(self.post_attention_norm(states))
        return output


class GatedCrossAttention(_AttentionBlock):
    """Attention to images, then an MLP, both gated (Alayrac et al., "Flamingo", 2022)."""

    def __init__(self, block: Block) -> None:
        attention = block.cross_attn
        super().__init__(block, attention)
        self.project_query = attention.q_proj
        self.project = FusedLinear(attention.k_proj, attention.v_proj)
        self.query_norm: Block = _RMSNorm(attention.q_layer_norm) if attention.qk_layer_norms else torch.nn.Identity()
        self.key_norm: Block = _RMSNorm(attention.k_layer_norm) if attention.qk_layer_norms else torch.nn.Identity()
        self.register_buffer("gate", block.act_cross_attn(block.alpha_cross_attn.data))
        self.register_buffer("mlp_gate", block.act_dense(block.alpha_dense.data))

    def keys_values(self, images: Tensor) -> KeysValues:
        """Keys and values, each (images, heads, width, head size), of features (images, width, size)."""
        split = _split_heads(self.project(images), 2 * self.heads)
        return self.key_norm(split[:, : self.heads]), split[:, self.heads :]

    def cross_attend(
        self,
        states: Tensor,
        keys: Tensor,
        values: Tensor,
        no_image: Tensor,
        attend: Attend,
        image_mask: Tensor | None = None,
    ) -> Tensor:
        """The states after the block (rows, length, hidden), from those before it.

        `keys` and `values`: (rows, heads, keys, head size). `no_image` (rows, 1 or length, 1): True for tokens that
        attend to none. `image_mask` (rows, 1, length, keys): what the others attend to; None: all.
        """
        query = self.query_norm(_split_heads(self.project_query(self.input_norm(states)), self.heads))
        attended = attend(query, keys, values, image_mask)
        return self.output(states + self.gate * self.out(_merge_heads(attended)).masked_fill(no_image, 0.0))

    def output(self, states: Tensor) -> Tensor:
        """The states after the MLP (rows, length, hidden): all that the block does where no row attends to an image."""
        output: Tensor = states + self.mlp_gate * self.mlp(self.post_attention_norm(states))
        return output


class TextModel(torch.nn.Module):
    """Layers with a cross-attention block before every few of them, between an embedding and a head."""

    def __init__(self, model: IdeficsForVisionText2Text) -> None:
        super().__init__()
        inner: Block = model.model
        self.embedding = _Embedding(inner.embed_tokens)
        self.rotary: Block = inner.layers[0].self_attn.rotary_emb
        self.layers: Block = torch.nn.ModuleList(map(DecoderLayer, inner.layers))
        self.blocks: Block = torch.nn.ModuleList(map(GatedCrossAttention, inner.gated_cross_attn_layers))
        self.norm = _RMSNorm(inner.norm)
        self.head = _head(model.lm_head)
        self.interval: int = model.config.cross_layer_interval

    def rotary_cos_sin(self, states: Tensor, positions: Tensor) -> KeysValues:
        """The rotary embedding's cosines and sines (rows, 1, length, head size) at `positions` (rows, length), in the
        type of `states`. The first half's sines are negated, so that a rotated half need not be."""
        cosine, sine = self.rotary(states, positions)
        first, second = sine.chunk(2, dim=-1)
        return cosine[:, None], torch.cat((-first, second), dim=-1)[:, None]

    def attention(self, *, is_short: bool) -> Attend:
        """The attention for a few new tokens of each row, or for any number."""
        weight = self.embedding.weight
        is_plain = weight.device.type == "cpu" and weight.dtype == torch.float32
        return eager_attention if is_short and is_plain else scaled_dot_product_attention

    def logits(self, states: Tensor) -> Tensor:
        """float32 logits (..., vocabulary) of last states (..., hidden)."""
        logits: Tensor = self.head(self.norm(states))
        return logits.float()


class _Embedding(torch.nn.Module):
    """The tokens' embedding, and the additional tokens', as one table."""

    weight: Tensor

    def __init__(self, table: IdeficsDecoupledEmbedding) -> None:
        super().__init__()
        added = [table.additional_embedding.weight] if table.num_additional_embeddings else []
        self.register_buffer("weight", _concatenated([table.weight, *added]))

    def forward(self, ids: Tensor) -> Tensor:
        """(rows, length) to (rows, length, hidden)."""
        return embedding(ids, self.weight)


def _head(head: Block) -> torch.nn.Module:
    """The output projection, and the additional tokens', as one."""
    is_decoupled = type(head) is IdeficsDecoupledLinear and head.bias is None and head.out_additional_features
    if is_decoupled and type(head.additional_fc) is torch.nn.Linear:
        return FusedLinear(head, head.additional_fc)
    return head  # type: ignore[no-any-return]


def _split_heads(states: Tensor, heads: int) -> Tensor:
    """(rows, length, heads * head size) as (rows, heads, length, head size)."""
    return states.view(*states.shape[:2], heads, -1).transpose(1, 2)


def _merge_heads(states: Tensor) -> Tensor:
    """(rows, heads, length, head size) as (rows, length, heads * head size)."""
    return states.transpose(1, 2).flatten(2)
