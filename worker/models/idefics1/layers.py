"""The layers that only IDEFICS has: the gated cross-attention to images, and the text model around them.

The arithmetic is that of transformers' `modeling_idefics.py`; what the families share is in `worker/models/layers.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention
from transformers import IdeficsForVisionText2Text
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledEmbedding, IdeficsDecoupledLinear

from worker.models.layers import (
    Attend,
    AttentionBlock,
    CosSin,
    DecoderLayer,
    FusedLinear,
    KeysValues,
    RMSNorm,
    StockModule,
    concatenated,
    eager_attention,
    merge_heads,
    rotary_cos_sin,
    runs_eagerly,
    split_heads,
)


class GatedCrossAttention(AttentionBlock):
    """Attention to images, then an MLP, both gated (Alayrac et al., "Flamingo", 2022)."""

    def __init__(self, block: StockModule) -> None:
        attention = block.cross_attn
        super().__init__(block, attention)
        self.heads: int = attention.num_heads
        self.project_query = attention.q_proj
        self.project = FusedLinear(attention.k_proj, attention.v_proj)
        self.query_norm: StockModule = (
            RMSNorm(attention.q_layer_norm) if attention.qk_layer_norms else torch.nn.Identity()
        )
        self.key_norm: StockModule = (
            RMSNorm(attention.k_layer_norm) if attention.qk_layer_norms else torch.nn.Identity()
        )
        self.register_buffer("gate", block.act_cross_attn(block.alpha_cross_attn.data))
        self.register_buffer("mlp_gate", block.act_dense(block.alpha_dense.data))

    def keys_values(self, images: Tensor) -> KeysValues:
        """Keys and values, each (images, heads, width, head size), projected from features (images, width, size)."""
        split = split_heads(self.project(images), 2 * self.heads)
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
        """The block's output (rows, length, hidden), from its input `states` of that shape.

        `keys` and `values`: (rows, heads, keys, head size). `no_image` (rows, 1 or length, 1): True for tokens that
        attend to no image. `image_mask` (rows, 1, length, keys): True where another token attends to a key; None: to
        all.
        """
        query = self.query_norm(split_heads(self.project_query(self.input_norm(states)), self.heads))
        attended = attend(query, keys, values, image_mask)
        return self.output(states + self.gate * self.out(merge_heads(attended)).masked_fill(no_image, 0.0))

    def output(self, states: Tensor) -> Tensor:
        """The MLP's output (rows, length, hidden), from its input of that shape: the whole block if no row attends to
        an image."""
        output: Tensor = states + self.mlp_gate * self.mlp(self.post_attention_norm(states))
        return output


class TextModel(torch.nn.Module):
    """The text model: an embedding, decoder layers with a cross-attention block before every `interval` of them, and a
    head."""

    def __init__(self, model: IdeficsForVisionText2Text) -> None:
        super().__init__()
        inner: StockModule = model.model
        self.embedding = _Embedding(inner.embed_tokens)
        self.rotary: StockModule = inner.layers[0].self_attn.rotary_emb
        self.layers: StockModule = torch.nn.ModuleList(
            DecoderLayer(layer, layer.self_attn.num_heads, layer.self_attn.num_heads) for layer in inner.layers
        )
        self.blocks: StockModule = torch.nn.ModuleList(map(GatedCrossAttention, inner.gated_cross_attn_layers))
        self.norm = RMSNorm(inner.norm)
        self.head = _head(model.lm_head)
        self.interval: int = model.config.cross_layer_interval

    def rotary_cos_sin(self, states: Tensor, positions: Tensor) -> CosSin:
        """Cosines and sines, each (rows, 1, length, head size), at `positions` (rows, length), in the dtype of
        `states`."""
        return rotary_cos_sin(self.rotary, states, positions)

    def attention(self, *, is_short: bool) -> Attend:
        """The attention function: for a few new tokens of each row (`is_short`), or for any number."""
        is_eager = is_short and runs_eagerly(self.embedding.weight)
        return eager_attention if is_eager else scaled_dot_product_attention

    def logits(self, states: Tensor) -> Tensor:
        """Logits (..., vocabulary) in float32, from the last layer's states (..., hidden)."""
        logits: Tensor = self.head(self.norm(states))
        return logits.float()


class _Embedding(torch.nn.Module):
    """The embeddings of the tokens and of the additional tokens as one table."""

    weight: Tensor

    def __init__(self, table: IdeficsDecoupledEmbedding) -> None:
        super().__init__()
        added = [table.additional_embedding.weight] if table.num_additional_embeddings else []
        self.register_buffer("weight", concatenated([table.weight, *added]))

    def forward(self, ids: Tensor) -> Tensor:
        """From ids (rows, length) to embeddings (rows, length, hidden)."""
        return embedding(ids, self.weight)


def _head(head: StockModule) -> torch.nn.Module:
    """The output projections for the tokens and for the additional tokens as one, if they are plain linear layers."""
    is_decoupled = type(head) is IdeficsDecoupledLinear and head.bias is None and head.out_additional_features
    if is_decoupled and type(head.additional_fc) is torch.nn.Linear:
        return FusedLinear(head, head.additional_fc, plain=(torch.nn.Linear, IdeficsDecoupledLinear))
    return head  # type: ignore[no-any-return]
