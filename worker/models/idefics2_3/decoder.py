"""The text decoders of Idefics2, Idefics3 and SmolVLM for the engine: stateless, their caches are handed in.

A picture's features take the place of its tokens' embeddings. So later tokens need nothing of it but keys and values, a
prefix may end anywhere, and a picture may be cut by a chunk of a prefill.
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
from worker.engine.tensors import padded
from worker.engine.traced import Traced
from worker.models.idefics2_3.network import Prefill, ScoredPrefill, Step, TextModel, TreeAttention

#: Rotary embeddings that depend on a token's position alone. Others change with the longest row of a batch.
STEADY_ROPE = ("default", "linear", "llama3", "yarn")


def has_decoder(model: PreTrainedModel) -> bool:
    """Whether a checkpoint's text model is one of those that `MergedDecoder` computes."""
    text = model.model.text_model
    return type(text) in (LlamaModel, MistralModel) and text.rotary_emb.rope_type in STEADY_ROPE


@dataclass(frozen=True, slots=True)
class MergedSegment:
    """See interfaces.PromptSegment."""

    ids: Sequence[int]
    #: The places of the image tokens in `ids`.
    places: Sequence[int]
    #: (image tokens, hidden)
    features: Tensor

    @property
    def carry(self) -> None:
        return None

    def split(self, length: int) -> tuple[MergedSegment, MergedSegment]:
        shown = bisect.bisect_left(self.places, length)
        rest = [place - length for place in self.places[shown:]]
        return (
            MergedSegment(self.ids[:length], self.places[:shown], self.features[:shown]),
            MergedSegment(self.ids[length:], rest, self.features[shown:]),
        )


class MergedDecoder:
    """See interfaces.Decoder. It has no extra pools."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.spec = _cache_spec(model)
        self._image_id: int = model.config.image_token_id
        text = TextModel(model)
        self._none = text.norm.weight.new_empty(0, text.norm.weight.shape[0])
        #: By whether nothing stands before the segments.
        self._prefills = {begins: Traced(Prefill(text, begins=begins)) for begins in (True, False)}
        self._scored_prefill = Traced(ScoredPrefill(text))
        self.step: Callable[..., Tensor] = Step(text)
        self.branch: Callable[..., Tensor] = TreeAttention(text)

    def segment(self, tokens: Tokens, features: Mapping[bytes, Tensor], carry: Tensor | None) -> MergedSegment:
        """See interfaces.Decoder. `features` (tokens, hidden) by key."""
        places = [place for place, id in enumerate(tokens.ids) if id == self._image_id]
        shown = [features[picture.key] for picture in tokens.pictures]
        merged = shown[0] if len(shown) == 1 else torch.cat((self._none, *shown))
        assert len(places) == len(merged), "each image token has its features"
        return MergedSegment(tokens.ids, places, merged)

    def prefill(
        self,
        segments: Sequence[MergedSegment],
        starts: Sequence[int],
        slots: Sequence[int],
        self_kv: Sequence[Tensor],
        extra: Sequence[Tensor],
    ) -> Tensor:
        """See interfaces.Decoder."""
        length = max(len(segment.ids) for segment in segments)
        ids = padded([segment.ids for segment in segments], length, 0, self.spec.device)
        return self._prefills[not any(starts)](*self._prompts(ids, segments, starts), *self_kv)

    def prefill_scored(
        self,
        segments: Sequence[MergedSegment],
        starts: Sequence[int],
        tree: TokenTree,
        firsts: Sequence[Sequence[int]],
        self_kv: Sequence[Tensor],
        extra: Sequence[Tensor],
    ) -> Tensor:
        """See interfaces.Decoder."""
        first = padded(firsts, max(map(len, firsts)), 0, self.spec.device)
        prompts = self._prompts(tree.ids, segments, starts)
        return self._scored_prefill(*prompts, tree.owner, tree.depth, first, tree.targets, *self_kv)

    def _prompts(self, ids: Tensor, segments: Sequence[MergedSegment], starts: Sequence[int]) -> tuple[Tensor, ...]:
        """The tensors of network.Prompts, for `ids` (segments, length) that begin with the segments'."""
        lasts = [len(segment.ids) - 1 for segment in segments]
        starts_and_lasts = torch.tensor([[*starts], lasts], device=self.spec.device)
        length = ids.shape[1]
        places = [row * length + place for row, segment in enumerate(segments) for place in segment.places]
        shown = [segment.features for segment in segments]
        features = shown[0] if len(shown) == 1 else torch.cat(shown)
        return (ids, *starts_and_lasts.unbind(), torch.tensor(places, dtype=torch.long, device=ids.device), features)


def _cache_spec(model: PreTrainedModel) -> CacheSpec:
    """What is kept for each row of a model."""
    text = model.model.text_model
    # A quantized model's other weights are of another type.
    weight = text.norm.weight
    key_heads = text.config.num_key_value_heads
    return CacheSpec(
        KVSpec(len(text.layers), key_heads, text.layers[0].self_attn.head_dim), weight.dtype, weight.device
    )
