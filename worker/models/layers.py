"""Layers that the families' text decoders share, with fewer calls than in transformers.

A decode step computes so little that each call's overhead costs as much as its arithmetic, on a GPU as on a CPU. So
linear layers with the same input are fused, and what does not change is computed once. The arithmetic is that of
transformers' `modeling_idefics.py` and `modeling_llama.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

#: A layer's keys and values.
KeysValues = tuple[Tensor, Tensor]
#: The cosines and sines of a rotary embedding (see `rotary_cos_sin`).
CosSin = tuple[Tensor, Tensor]
#: A module of transformers, whose attributes are not typed.
StockModule = Any
#: Scaled dot-product attention: from queries, keys and values (rows, heads, length, head size) and a mask that is True
#: where a query attends to a key, to (rows, heads, queries, head size).
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def eager_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as separate operations. For a few queries on a CPU, torch's fused kernel takes up to 50 % longer.

    `query` (rows, heads, queries, head size), `keys` and `values` (rows, heads, keys, head size), `mask` (rows, 1 or
    heads, queries, keys), True where a query attends to a key. The result has the shape of `query`.
    """
    scores = torch.matmul(query * query.shape[-1] ** -0.5, keys.transpose(-1, -2))
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf)
    return torch.matmul(scores.softmax(dim=-1), values)


def runs_eagerly(weight: Tensor) -> bool:
    """Whether `eager_attention` is faster for few queries in a model with this weight (any shape)."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32


class FusedLinear(torch.nn.Module):
    """Linear layers with the same input as one layer, their outputs concatenated in the last dimension."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, *layers: StockModule, plain: tuple[type, ...] = (torch.nn.Linear,)) -> None:
        """`plain`: the classes that compute nothing but a product with `weight` and a sum with `bias`."""
        super().__init__()
        biases = [layer.bias for layer in layers if layer.bias is not None]
        # Layers of other classes, such as quantized ones, run one by one.
        are_plain = all(type(layer) in plain for layer in layers) and len(biases) in (0, len(layers))
        self.register_buffer("weight", concatenated([layer.weight for layer in layers]) if are_plain else None)
        self.register_buffer("bias", concatenated(biases) if are_plain and biases else None)
        self.layers = torch.nn.ModuleList([] if are_plain else layers)

    def forward(self, states: Tensor) -> Tensor:
        """From (..., inputs) to (..., outputs of all layers)."""
        if self.weight is None:
            return torch.cat([layer(states) for layer in self.layers], dim=-1)
        return linear(states, self.weight, self.bias)


def concatenated(parameters: Sequence[torch.nn.Parameter]) -> Tensor:
    """Parameters (outputs, ...) concatenated to (all outputs, ...). They become views of it, so no copy stays."""
    whole = torch.cat([parameter.data for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = whole[start : start + len(parameter)]
        start += len(parameter)
    return whole


class RMSNorm(torch.nn.Module):
    """Root mean square normalization (Zhang and Sennrich, 2019), in half the operations of transformers' module, on a
    GPU in one."""

    eps: Tensor

    def __init__(self, norm: StockModule) -> None:
        super().__init__()
        self.weight = norm.weight
        self.epsilon = float(norm.variance_epsilon)
        self.register_buffer("eps", torch.tensor(norm.variance_epsilon, device=norm.weight.device))

    def forward(self, states: Tensor) -> Tensor:
        """From (..., size) to the same shape."""
        if states.is_cuda and states.dtype == self.weight.dtype:
            return self.fused(states)
        exact = states.float()
        squares = torch.linalg.vecdot(exact, exact)[..., None]
        scale = torch.add(self.eps, squares, alpha=1 / states.shape[-1]).rsqrt()
        normed: Tensor = (states * scale).to(self.weight.dtype) * self.weight
        return normed

    def fused(self, states: Tensor) -> Tensor:
        """The same by torch's function, which is one kernel on a GPU. On a CPU it is more operations than `forward`."""
        return rms_norm(states, self.weight.shape, self.weight, self.epsilon)


class GatedMlp(torch.nn.Module):
    """A gated MLP whose first two layers are fused."""

    def __init__(self, mlp: StockModule) -> None:
        super().__init__()
        self.gate_and_up = FusedLinear(mlp.gate_proj, mlp.up_proj)
        self.act = mlp.act_fn
        self.down = mlp.down_proj

    def forward(self, states: Tensor) -> Tensor:
        """From (rows, length, hidden) to the same shape."""
        gate, up = self.gate_and_up(states).chunk(2, dim=-1)
        output: Tensor = self.down(self.act(gate) * up)
        return output


class AttentionBlock(torch.nn.Module):
    """The parts of every attention layer: two norms, the attention's output projection, and an MLP."""

    def __init__(self, layer: StockModule, attention: StockModule) -> None:
        super().__init__()
        self.input_norm = RMSNorm(layer.input_layernorm)
        self.post_attention_norm = RMSNorm(layer.post_attention_layernorm)
        self.out = attention.o_proj
        self.mlp = GatedMlp(layer.mlp)


class DecoderLayer(AttentionBlock):
    """Self-attention, then an MLP."""

    def __init__(self, layer: StockModule, heads: int, key_heads: int) -> None:
        """`heads`: query heads. `key_heads`: key and value heads; fewer if several query heads share one."""
        attention = layer.self_attn
        super().__init__(layer, attention)
        self.heads, self.key_heads = heads, key_heads
        self.project = FusedLinear(attention.q_proj, attention.k_proj, attention.v_proj)

    def query_keys_values(self, states: Tensor, rotary: CosSin) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (rows, heads, length, head size), keys and values (rows, key heads, length, head size) from `states`
        (rows, length, hidden). `rotary`: the result of `rotary_cos_sin`, each (rows, 1, length, head size)."""
        keys_end = self.heads + self.key_heads
        split = split_heads(self.project(self.input_norm(states)), keys_end + self.key_heads)
        rotated, value = split[:, :keys_end], split[:, keys_end:]
        cosine, sine = rotary
        rotated = rotated * cosine + rotated.roll(rotated.shape[-1] // 2, dims=-1) * sine
        return rotated[:, : self.heads], rotated[:, self.heads :], value

    def output(self, states: Tensor, attended: Tensor) -> Tensor:
        """The layer's output (rows, length, hidden), from its input `states` of that shape and the attention's result
        `attended` (rows, heads, length, head size)."""
        states = states + self.out(merge_heads(attended))
        output: Tensor = states + self.mlp(self.post_attention_norm(states))
        return output


def rotary_cos_sin(rotary: StockModule, states: Tensor, positions: Tensor) -> CosSin:
    """A rotary embedding's cosines and sines, each (rows, 1, length, head size), at `positions` (rows, length), in the
    dtype of `states` (any shape). The first half of the sines is negated here, so that the states need not be."""
    cosine, sine = rotary(states, positions)
    first, second = sine.chunk(2, dim=-1)
    return cosine[:, None], torch.cat((-first, second), dim=-1)[:, None]


def causal_mask(positions: Tensor, keys: int, window: int | None = None) -> Tensor:
    """The mask (rows, 1, length, keys) of tokens at `positions` (rows, length): each attends to the tokens up to
    itself, and with a sliding window to the last `window` of them."""
    columns = torch.arange(keys, device=positions.device)
    mask = columns <= positions[..., None]
    if window is not None:
        mask = mask & (columns > positions[..., None] - window)
    return mask[:, None]


def split_heads(states: Tensor, heads: int) -> Tensor:
    """Reshape (rows, length, heads * head size) to (rows, heads, length, head size)."""
    return states.view(*states.shape[:2], heads, -1).transpose(1, 2)


def merge_heads(states: Tensor) -> Tensor:
    """Reshape (rows, heads, length, head size) to (rows, length, heads * head size)."""
    return states.transpose(1, 2).flatten(2)
