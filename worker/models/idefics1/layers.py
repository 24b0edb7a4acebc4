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

KeysValues = tuple[Tensor, Tensor]
#: One of transformers' modules, which are not typed.
Block = Any


#: Layers of which joining needs only the weights, which have no bias.
_PLAIN = (torch.nn.Linear, IdeficsDecoupledLinear)
#: Scaled dot-product attention of queries, keys and values (rows, heads, length, head size); what a mask says is seen.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def in_parts(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as its parts: of a few queries, torch's one kernel takes up to a half longer on a CPU."""
    scores = torch.matmul(query * query.shape[-1] ** -0.5, keys.transpose(-1, -2))
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf)
    return torch.matmul(scores.softmax(dim=-1), values)


class Joined(torch.nn.Module):
    """Linear layers of one input side by side: their outputs follow one another in the last dimension."""

    weight: Tensor | None

    def __init__(self, *layers: Block) -> None:
        super().__init__()
        # Others (quantized ones, for example) run one by one.
        are_plain = all(type(layer) in _PLAIN and layer.bias is None for layer in layers)
        self.register_buffer("weight", _joined([layer.weight for layer in layers]) if are_plain else None)
        self.layers = torch.nn.ModuleList([] if are_plain else layers)

    def forward(self, states: Tensor) -> Tensor:
        if self.weight is None:
            return torch.cat([layer(states) for layer in self.layers], dim=-1)
        return linear(states, self.weight)


def _joined(parameters: Sequence[torch.nn.Parameter]) -> Tensor:
    """Their rows in one tensor, whose parts they become: nothing is held twice."""
    whole = torch.cat([parameter.data for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = whole[start : start + len(parameter)]
        start += len(parameter)
    return whole


class _Norm(torch.nn.Module):
    """Root mean square normalization, in half of torch's operations."""

    eps: Tensor

    def __init__(self, norm: Block) -> None:
        super().__init__()
        self.weight = norm.weight
        self.register_buffer("eps", torch.tensor(norm.variance_epsilon, device=norm.weight.device))

    def forward(self, states: Tensor) -> Tensor:
        exact = states.float()
        squares = torch.linalg.vecdot(exact, exact)[..., None]
        scale = torch.add(self.eps, squares, alpha=1 / states.shape[-1]).rsqrt()
        normed: Tensor = (states * scale).to(self.weight.dtype) * self.weight
        return normed


class _Mlp(torch.nn.Module):
    def __init__(self, mlp: Block) -> None:
        super().__init__()
        self.gate_and_up = Joined(mlp.gate_proj, mlp.up_proj)
        self.act = mlp.act_fn
        self.down = mlp.down_proj

    def forward(self, states: Tensor) -> Tensor:
        gate, up = self.gate_and_up(states).chunk(2, dim=-1)
        mixed: Tensor = self.down(self.act(gate) * up)
        return mixed


class _Attention(torch.nn.Module):
    """What both kinds of layers have."""

    def __init__(self, layer: Block, attention: Block) -> None:
        super().__init__()
        self.heads: int = attention.num_heads
        self.before, self.between = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self.out = attention.o_proj
        self.mlp = _Mlp(layer.mlp)


class Layer(_Attention):
    """The text's own attention, then an MLP."""

    def __init__(self, layer: Block) -> None:
        attention = layer.self_attn
        super().__init__(layer, attention)
        self.project = Joined(attention.q_proj, attention.k_proj, attention.v_proj)

    def query_keys_values(self, states: Tensor, turns: KeysValues) -> tuple[Tensor, Tensor, Tensor]:
        """Each (rows, heads, length, head size). `turns` are the rotary embedding's (see `Decoder.turns`)."""
        headed = _headed(self.project(self.before(states)), 3 * self.heads)
        turned, value = headed[:, : 2 * self.heads], headed[:, 2 * self.heads :]
        cosine, sine = turns
        turned = turned * cosine + turned.roll(turned.shape[-1] // 2, dims=-1) * sine
        return turned[:, : self.heads], turned[:, self.heads :], value

    def mixed(self, states: Tensor, attended: Tensor) -> Tensor:
        """The states after the layer, from what its heads attended to."""
        states = states + self.out(_joint(attended))
        mixed: Tensor = states + self.mlp(self.between(states))
        return mixed


class ImageBlock(_Attention):
    """Attention to images, then an MLP, both gated."""

    def __init__(self, block: Block) -> None:
        attention = block.cross_attn
        super().__init__(block, attention)
        self.project_query = attention.q_proj
        self.project = Joined(attention.k_proj, attention.v_proj)
        self.query_norm: Block = _Norm(attention.q_layer_norm) if attention.qk_layer_norms else torch.nn.Identity()
        self.key_norm: Block = _Norm(attention.k_layer_norm) if attention.qk_layer_norms else torch.nn.Identity()
        self.register_buffer("gate", block.act_cross_attn(block.alpha_cross_attn.data))
        self.register_buffer("mlp_gate", block.act_dense(block.alpha_dense.data))

    def keys_values(self, images: Tensor) -> KeysValues:
        """Of images (images, width, size), each (images, heads, width, head size)."""
        headed = _headed(self.project(images), 2 * self.heads)
        return self.key_norm(headed[:, : self.heads]), headed[:, self.heads :]

    def looked(
        self, states: Tensor, keys: Tensor, values: Tensor, blind: Tensor, attend: Attend, looks: Tensor | None = None
    ) -> Tensor:
        """The states after the block. Those that are `blind` see nothing; `looks` is a mask for the others."""
        query = self.query_norm(_headed(self.project_query(self.before(states)), self.heads))
        attended = attend(query, keys, values, looks)
        return self.mixed(states + self.gate * self.out(_joint(attended)).masked_fill(blind, 0.0))

    def mixed(self, states: Tensor) -> Tensor:
        """What the block does where no row sees an image."""
        mixed: Tensor = states + self.mlp_gate * self.mlp(self.between(states))
        return mixed


class Decoder(torch.nn.Module):
    """Layers with an image block before every few of them, between an embedding and a head."""

    def __init__(self, model: IdeficsForVisionText2Text) -> None:
        super().__init__()
        inner: Block = model.model
        self.embedding = _Embedding(inner.embed_tokens)
        self.rotary: Block = inner.layers[0].self_attn.rotary_emb
        self.layers: Block = torch.nn.ModuleList(map(Layer, inner.layers))
        self.blocks: Block = torch.nn.ModuleList(map(ImageBlock, inner.gated_cross_attn_layers))
        self.norm = _Norm(inner.norm)
        self.head = _head(model.lm_head)
        self.interval: int = model.config.cross_layer_interval

    def turns(self, states: Tensor, positions: Tensor) -> KeysValues:
        """The rotary embedding's cosines and sines (rows, 1, length, head size), the first half's sines negated: a half
        that is moved need not be."""
        cosine, sine = self.rotary(states, positions)
        first, second = sine.chunk(2, dim=-1)
        return cosine[:, None], torch.cat((-first, second), dim=-1)[:, None]

    def attention(self, *, is_short: bool) -> Attend:
        """For a few new tokens of each row, or for any number."""
        weight = self.embedding.weight
        is_plain = weight.device.type == "cpu" and weight.dtype == torch.float32
        return in_parts if is_short and is_plain else scaled_dot_product_attention

    def logits(self, states: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(states))
        return logits.float()


class _Embedding(torch.nn.Module):
    weight: Tensor

    def __init__(self, table: IdeficsDecoupledEmbedding) -> None:
        super().__init__()
        added = [table.additional_embedding.weight] if table.num_additional_embeddings else []
        self.register_buffer("weight", _joined([table.weight, *added]))

    def forward(self, ids: Tensor) -> Tensor:
        return embedding(ids, self.weight)


def _head(head: Block) -> torch.nn.Module:
    """The head and the additional tokens' as one."""
    is_decoupled = type(head) is IdeficsDecoupledLinear and head.bias is None and head.out_additional_features
    if is_decoupled and type(head.additional_fc) is torch.nn.Linear:
        return Joined(head, head.additional_fc)
    return head  # type: ignore[no-any-return]


def _headed(states: Tensor, heads: int) -> Tensor:
    """(rows, length, heads * head size) as (rows, heads, length, head size)."""
    return states.view(*states.shape[:2], heads, -1).transpose(1, 2)


def _joint(states: Tensor) -> Tensor:
    """(rows, heads, length, head size) as (rows, length, heads * head size)."""
    return states.transpose(1, 2).flatten(2)
