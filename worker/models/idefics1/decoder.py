"""IDEFICS' text decoder for the engine: stateless, since the engine passes in the caches.

The keys and values of the cross-attention are cached too, which transformers' own decoder computes again at each step.
They are kept for a row's last image only: each token attends to the last image before it, and to no other.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import IdeficsForVisionText2Text

from worker.engine.interfaces import CacheSpec, KVSpec
from worker.engine.row import Tokens
from worker.engine.scoring import TokenTree
from worker.engine.tensors import padded, to_device
from worker.engine.traced import Traced
from worker.models.idefics1.layers import TextModel
from worker.models.idefics1.network import (
    DecodeStep,
    Prefill,
    ScoredPrefill,
    ScoredTextPrefill,
    TextPrefill,
    TreeAttention,
)
from worker.models.paged_attention import block_tokens

#: Maximum new tokens of a row that count as few (see layers.eager_attention).
FEW = 24


@dataclass(frozen=True, slots=True)
class IdeficsSegment:
    """Consecutive tokens of a prompt, with the features of the images among them."""

    ids: Sequence[int]
    #: Features (width, size) of each image among the tokens.
    images: Sequence[Tensor]
    #: The indices of the image tokens in `ids`.
    places: Sequence[int]
    #: Features (width, size) of the last image before the tokens.
    image_before: Tensor | None = None

    @property
    def carry(self) -> Tensor | None:
        """Features (width, size) of the last image, which the tokens after the segment attend to."""
        return self.images[-1] if self.images else self.image_before

    def split(self, length: int) -> tuple[IdeficsSegment, IdeficsSegment]:
        """Split into the first `length` tokens and the rest."""
        shown = bisect.bisect_left(self.places, length)
        first = IdeficsSegment(self.ids[:length], self.images[:shown], self.places[:shown], self.image_before)
        places = [place - length for place in self.places[shown:]]
        return first, IdeficsSegment(self.ids[length:], self.images[shown:], places, first.carry)


class IdeficsDecoder:
    """Implements interfaces.Decoder. Its extra pool holds the cross-attention's keys and values of each row's last
    image."""

    def __init__(self, model: IdeficsForVisionText2Text, image_id: int) -> None:
        """`image_id`: the token that stands for an image."""
        self.spec = cache_spec(model)
        text = TextModel(model)
        #: By whether all prompts begin with the segments, and whether the segments are short.
        self._prefills = {
            (begins, is_short): Traced(Prefill(text, image_id, begins=begins, is_short=is_short))
            for begins, is_short in itertools.product((True, False), repeat=2)
        }
        self._scored_prefills = {
            is_short: Traced(ScoredPrefill(text, image_id, is_short=is_short)) for is_short in (True, False)
        }
        self._text_prefill = Traced(TextPrefill(text))
        self._scored_text_prefill = Traced(ScoredTextPrefill(text))
        self.step: Callable[..., Tensor] = DecodeStep(text, is_short=True)
        self.branch: Callable[..., Tensor] = TreeAttention(text)

    def segment(self, tokens: Tokens, features: Mapping[bytes, Tensor], carry: Tensor | None) -> IdeficsSegment:
        """Combine tokens with the features (width, size) of their pictures, by key. `carry` (width, size): the features
        of the last image before the tokens; None if there is none."""
        images = [features[picture.key] for picture in tokens.pictures]
        return IdeficsSegment(tokens.ids, images, [span.start for span in tokens.spans], carry)

    def prefill(
        self,
        segments: Sequence[IdeficsSegment],
        starts: Sequence[int],
        slots: Sequence[int],
        self_kv: Sequence[Tensor],
        extra: Sequence[Tensor],
    ) -> Tensor:
        """Write the keys and values of segments into `slots`, after `starts` tokens each. Returns the logits (segments,
        vocabulary) after each segment. `self_kv` and `extra`: see interfaces.Decoder."""
        length = max(len(segment.ids) for segment in segments)
        # Padding on the right needs no mask: no real token attends to it, and later tokens overwrite it.
        ids = padded([segment.ids for segment in segments], length, 0, self.spec.device)
        numbers = self._numbers(segments, starts, slots)
        if not extra:
            return self._text_prefill(ids, *numbers[:2], self_kv=self_kv)
        prefill = self._prefills[not any(starts), length <= FEW]
        return prefill(ids, *numbers, *self._image_tensors(segments), self_kv=self_kv, extra=extra)

    def prefill_scored(
        self,
        segments: Sequence[IdeficsSegment],
        starts: Sequence[int],
        slots: Sequence[int],
        tree: TokenTree,
        firsts: Sequence[Sequence[int]],
        self_kv: Sequence[Tensor],
        extra: Sequence[Tensor],
    ) -> Tensor:
        """Prefill segments into the first slots, and score sequences after them. Returns log-probabilities (segments,
        firsts + targets). `self_kv` and `extra`: see interfaces.Decoder."""
        first = padded(firsts, max(map(len, firsts)), 0, self.spec.device)
        numbers = self._numbers(segments, starts, slots)
        scored = tree.owner, tree.depth, first, tree.targets
        if not extra:
            return self._scored_text_prefill(tree.ids, *numbers[:2], *scored, self_kv=self_kv)
        score = self._scored_prefills[tree.ids.shape[1] <= FEW]
        return score(tree.ids, *numbers, *self._image_tensors(segments), *scored, self_kv=self_kv, extra=extra)

    def _numbers(
        self, segments: Sequence[IdeficsSegment], starts: Sequence[int], slots: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """`starts`, the index of each segment's last token, and `slots`, each (segments,)."""
        lasts = [len(segment.ids) - 1 for segment in segments]
        # One tensor, since making one releases the interpreter lock and has to acquire it again.
        return to_device([[*starts], lasts, [*slots]], self.spec.device).unbind()

    def _image_tensors(self, segments: Sequence[IdeficsSegment]) -> tuple[Tensor, ...]:
        """`images`, `shown`, `kept`, `no_image_before` and `first` of network.Prompts, in the shapes given there."""
        device = self.spec.device
        # Number 0, the image before the segment, is left out if no token of any row attends to it.
        first = int(all(segment.image_before is None or segment.places[:1] == [0] for segment in segments))
        rows = [[segment.image_before, *segment.images][first:] for segment in segments]
        distinct = {id(image): image for row in rows for image in row if image is not None}
        numbers = {key: number for number, key in enumerate(distinct)}
        shown = [[numbers.get(id(image), 0) for image in row] for row in rows]
        return (
            torch.stack(list(distinct.values())).to(device=device, dtype=self.spec.dtype),
            padded(shown, max(map(len, rows)), 0, device),
            to_device([numbers.get(id(segment.carry), 0) for segment in segments], device),
            to_device([segment.image_before is None for segment in segments], device),
            to_device(first, device),
        )


def cache_spec(model: IdeficsForVisionText2Text) -> CacheSpec:
    """The caches that the decoder needs for each row."""
    layers, blocks = model.model.layers, model.model.gated_cross_attn_layers
    self_attention, cross_attention = layers[0].self_attn, blocks[0].cross_attn
    width, size = feature_shape(model)
    # In a quantized model, other weights have another dtype.
    weight = model.model.norm.weight
    return CacheSpec(
        KVSpec(len(layers), self_attention.num_heads, self_attention.head_dim),
        weight.dtype,
        weight.device,
        (KVSpec(len(blocks), cross_attention.num_heads, cross_attention.head_dim, width),),
        width * size * weight.dtype.itemsize,
        block_tokens(weight.device, weight.dtype, self_attention.head_dim),
    )


def feature_shape(model: IdeficsForVisionText2Text) -> tuple[int, int]:
    """The width and the size of one image's features. The width is the number of the resampler's latents, or of the
    vision tower's patches and its class token."""
    config = model.config
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    width = config.perceiver_config.resampler_n_latents if config.use_resampler else patches + 1
    return int(width), int(vision.embed_dim)
