"""The second bundled model begins with the weights of the first wherever they fit.

It has the same word pieces and the same layers in its vision tower. Its six text layers come from the first one's four
and their two layers of cross-attention. The connector and a third of each MLP begin at random.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Idefics3ForConditionalGeneration, IdeficsForVisionText2Text

#: Mean over many pictures' patches of the standard deviation that the first model's norm before its layers divides by.
PATCH_DEVIATION = 0.83
#: The id of the token by which the first model ends most answers.
FIRST_END = 2

#: Mean and standard deviation of each channel.
Normalization = tuple[Sequence[float], Sequence[float]]


@torch.no_grad()
def take_over_vision(
    model: Idefics3ForConditionalGeneration,
    first: IdeficsForVisionText2Text,
    *,
    seen_as: Normalization,
    sees_as: Normalization,
) -> None:
    """The layers as they are. SigLIP has no norm before them, so that one becomes part of the embeddings, with a mean
    deviation in place of each patch's own. `seen_as`: how the first model's pixels are normalised; `sees_as`: ours."""
    ours, theirs = model.model.vision_model, first.model.vision_model
    ours.encoder.load_state_dict(theirs.encoder.state_dict())
    kernel, bias = _renormalized(theirs.embeddings.patch_embedding.weight, seen_as, sees_as)
    norm = theirs.pre_layrnorm
    factor = norm.weight / PATCH_DEVIATION
    # Without the class token.
    place = theirs.embeddings.position_embedding.weight[1:]
    ours.embeddings.patch_embedding.weight.copy_((kernel - kernel.mean(0)) * factor[:, None, None, None])
    ours.embeddings.patch_embedding.bias.copy_((bias - bias.mean()) * factor + norm.bias)
    ours.embeddings.position_embedding.weight.copy_((place - place.mean(1, keepdim=True)) * factor)


def _renormalized(kernel: Tensor, seen_as: Normalization, sees_as: Normalization) -> tuple[Tensor, Tensor]:
    """A convolution's kernel (width, 3, side, side) for pixels that are normalised otherwise, and its bias (width)."""
    (mean, std), (our_mean, our_std) = (
        [torch.tensor(each)[None, :, None, None] for each in n] for n in (seen_as, sees_as)
    )
    return kernel * our_std / std, (kernel * (our_mean - mean) / std).sum((1, 2, 3))


@torch.no_grad()
def take_over_text(
    model: Idefics3ForConditionalGeneration, first: IdeficsForVisionText2Text, special: Sequence[int]
) -> None:
    """Embeddings, output layer and norm; and each layer from one of the first model's, in their order.

    `special`: our ids of the first model's additional tokens, in its order; an utterance's end is the last.
    """
    ours, theirs = model.model.text_model, first.model
    embedded, said = theirs.embed_tokens, first.lm_head
    _take_over_tokens(ours.embed_tokens.weight, embedded.weight, embedded.additional_embedding.weight, special)
    _take_over_tokens(model.lm_head.weight, said.weight, said.additional_fc.weight, special)
    ours.norm.load_state_dict(theirs.norm.state_dict())
    (cross_1, cross_2), layers = theirs.gated_cross_attn_layers, theirs.layers
    for layer, taken in zip(ours.layers, (cross_1, *layers[:2], cross_2, *layers[2:]), strict=True):
        _take_over_layer(layer, taken)


def _take_over_tokens(ours: Tensor, pieces: Tensor, additional: Tensor, ids: Sequence[int]) -> None:
    """Rows of width 192: one for each word piece, and those of the additional tokens at `ids`."""
    ours[: len(pieces)].copy_(pieces)
    ours[list(ids)] = additional
    ours[ids[-1]] = pieces[FIRST_END]


def _take_over_layer(ours: Any, theirs: Any) -> None:
    """A layer with fewer heads of keys and values and a wider MLP. Of a cross-attention, the open gates become part of
    what they let through."""
    is_cross = hasattr(theirs, "cross_attn")
    attention = theirs.cross_attn if is_cross else theirs.self_attn
    attended, computed = (theirs.alpha_cross_attn.tanh(), theirs.alpha_dense.tanh()) if is_cross else (1.0, 1.0)
    for name in ("input_layernorm", "post_attention_layernorm"):
        getattr(ours, name).load_state_dict(getattr(theirs, name).state_dict())
    ours.self_attn.q_proj.weight.copy_(attention.q_proj.weight)
    ours.self_attn.o_proj.weight.copy_(_scaled(attention.o_proj.weight, attended))
    for name in ("k_proj", "v_proj"):
        # Each of our heads is the mean of those whose queries it serves.
        groups = getattr(attention, name).weight.unflatten(
            0, (-1, ours.self_attn.num_key_value_groups, ours.self_attn.head_dim)
        )
        getattr(ours.self_attn, name).weight.copy_(groups.mean(1).flatten(0, 1))
    width = theirs.mlp.gate_proj.out_features
    ours.mlp.gate_proj.weight[:width].copy_(theirs.mlp.gate_proj.weight)
    ours.mlp.up_proj.weight[:width].copy_(theirs.mlp.up_proj.weight)
    ours.mlp.down_proj.weight[:, :width].copy_(_scaled(theirs.mlp.down_proj.weight, computed))


def _scaled(weight: Tensor, gate: Tensor | float) -> Tensor:
    """A layer's weight (out, in) with a gate (1, 1, out) behind it."""
    return weight * gate.flatten()[:, None] if isinstance(gate, Tensor) else weight
