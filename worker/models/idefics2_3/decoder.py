"""The text decoder of Idefics2, Idefics3 and SmolVLM for the engine: stateless, since the engine passes in the caches.

A picture's features are merged into the prompt: they take the place of its image tokens' embeddings. So later tokens
need only its keys and values, a prefix may end anywhere, and a chunk of a prefill may end inside a picture.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaModel, MistralModel, PreTrainedModel

from worker.engine.interfaces import CacheSpec, KVSpec
from worker.engine.row import Tokens
from worker.engine.scoring import TokenTree
from worker.engine.tensors import padded, to_device
from worker.engine.traced import Traced
from worker.models.idefics2_3.network import DecodeStep, Prefill, ScoredPrefill, TextModel, TreeAttention
from worker.models.paged_attention import block_tokens

#: Types of rotary embedding that depend on a token's position only. Others change with the longest row of a batch.
STEADY_ROPE = ("default", "linear", "llama3", "yarn")


def has_decoder(model: PreTrainedModel) -> bool:
    """Whether `MergedDecoder` supports a checkpoint's text model."""
    return type(model.model.text_model) in (LlamaModel, MistralModel) and steady_tokens(model) is None


def steady_tokens(model: PreTrainedModel) -> int | None:
    """See engine/stock.Adapter."""
    text = model.model.text_model
    if text.rotary_emb.rope_type in STEADY_ROPE:
        return None
    trained: int | None = text.config.rope_parameters.get("original_max_position_embeddings")
    return trained or int(text.config.max_position_embeddings)


@dataclass(frozen=True, slots=True)
class MergedSegment:
    """Consecutive tokens of a prompt, with the features that replace the embeddings of the image tokens among them."""

    ids: Sequence[int]
    #: The indices of the image tokens in `ids`.
    places: Sequence[int]
    #: (image tokens, hidden): the features of each image token.
    features: Tensor

    @property
    def carry(self) -> None:
        """None: later tokens need only keys and values."""
        return None

    def split(self, length: int) -> tuple[MergedSegment, MergedSegment]:
        """Split into the first `length` tokens and the rest."""
        shown = bisect.bisect_left(self.places, length)
        rest = [place - length for place in self.places[shown:]]
        return (
            MergedSegment(self.ids[:length], self.places[:shown], self.features[:shown]),
            MergedSegment(self.ids[length:], rest, self.features[shown:]),
        )


class MergedDecoder:
    """Implements interfaces.Decoder, without extra pools."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.spec = _cache_spec(model)
        self._image_id: int = model.config.image_token_id
        text = TextModel(model)
        self._none = text.norm.weight.new_empty(0, text.norm.weight.shape[0])
        #: By whether all prompts begin with the segments.
        self._prefills = {begins: Traced(Prefill(text, begins=begins)) for begins in (True, False)}
        self._scored_prefill = Traced(ScoredPrefill(text))
        self.step: Callable[..., Tensor] = DecodeStep(text)
        self.branch: Callable[..., Tensor] = TreeAttention(text)

    def segment(self, tokens: Tokens, features: Mapping[bytes, Tensor], carry: Tensor | None) -> MergedSegment:
        """Combine tokens with the features (image tokens, hidden) of their pictures, by key. `carry` is None."""
        places = [place for place, id in enumerate(tokens.ids) if id == self._image_id]
        shown = [features[picture.key] for picture in tokens.pictures]
        merged = shown[0] if len(shown) == 1 else torch.cat((self._none, *shown))
        assert len(places) == len(merged), "each image token needs its features"
        return MergedSegment(tokens.ids, places, merged)

    def prefill(
        self,
        segments: Sequence[MergedSegment],
        starts: Sequence[int],
        slots: Sequence[int],
        self_kv: Sequence[Tensor],
        extra: Sequence[Tensor],
    ) -> Tensor:
        """Write the keys and values of segments into the first slots, after `starts` tokens each. Returns the logits
        (segments, vocabulary) after each segment. `self_kv`: see interfaces.Decoder."""
        length = max(len(segment.ids) for segment in segments)
        ids = padded([segment.ids for segment in segments], length, 0, self.spec.device)
        return self._prefills[not any(starts)](*self._prompts(ids, segments, starts), self_kv=self_kv)

    def prefill_scored(
        self,
        segments: Sequence[MergedSegment],
        starts: Sequence[int],
        slots: Sequence[int],
        tree: TokenTree,
        firsts: Sequence[Sequence[int]],
        self_kv: Sequence[Tensor],
        extra: Sequence[Tensor],
    ) -> Tensor:
        """Prefill segments into the first slots, and score sequences after them. Returns log-probabilities (segments,
        firsts + targets). `self_kv`: see interfaces.Decoder."""
        first = padded(firsts, max(map(len, firsts)), 0, self.spec.device)
        prompts = self._prompts(tree.ids, segments, starts)
        return self._scored_prefill(*prompts, tree.owner, tree.depth, first, tree.targets, self_kv=self_kv)

    def _prompts(self, ids: Tensor, segments: Sequence[MergedSegment], starts: Sequence[int]) -> tuple[Tensor, ...]:
        """The tensors of network.Prompts. `ids` (segments, length) begin with the ids of the segments."""
        lasts = [len(segment.ids) - 1 for segment in segments]
        starts_and_lasts = to_device([[*starts], lasts], self.spec.device)
        length = ids.shape[1]
        places = [row * length + place for row, segment in enumerate(segments) for place in segment.places]
        shown = [segment.features for segment in segments]
        features = shown[0] if len(shown) == 1 else torch.cat(shown)
        return (ids, *starts_and_lasts.unbind(), to_device(places, self.spec.device, torch.long), features)


def _cache_spec(model: PreTrainedModel) -> CacheSpec:
    """The caches that the decoder needs for each row."""
    text = model.model.text_model
    # In a quantized model, other weights have another dtype.
    weight = text.norm.weight
    heads, head_size = text.config.num_key_value_heads, text.layers[0].self_attn.head_dim
    return CacheSpec(
        KVSpec(len(text.layers), heads, head_size),
        weight.dtype,
        weight.device,
        block_tokens=block_tokens(weight.device, weight.dtype, head_size),
    )
