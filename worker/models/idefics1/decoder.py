"""IDEFICS' text decoder for the engine: stateless, its caches are handed in.

Beside prefixes, the cross-attention's keys and values are kept, which transformers' own decoder projects again at each
step. Of those, only the last image's: each token attends to the image before it, and to no other.
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
    Prefill,
    ScoredPrefill,
    ScoredTextPrefill,
    TextPrefill,
    TextStep,
    TreeAttention,
)

#: New tokens of a row that are few (see layers.eager_attention).
FEW = 24


@dataclass(frozen=True, slots=True)
class IdeficsSegment:
    """See interfaces.PromptSegment. Its carry is the last image, which the tokens behind it attend to."""

    ids: Sequence[int]
    #: Features (width, size) of each image among the tokens.
    images: Sequence[Tensor]
    #: The places of the image tokens in `ids`.
    places: Sequence[int]
    #: Features (width, size) of the last image before the tokens.
    image_before: Tensor | None = None

    @property
    def carry(self) -> Tensor | None:
        return self.images[-1] if self.images else self.image_before

    def split(self, length: int) -> tuple[IdeficsSegment, IdeficsSegment]:
        shown = bisect.bisect_left(self.places, length)
        first = IdeficsSegment(self.ids[:length], self.images[:shown], self.places[:shown], self.image_before)
        places = [place - length for place in self.places[shown:]]
        return first, IdeficsSegment(self.ids[length:], self.images[shown:], places, first.carry)


class IdeficsDecoder:
    """See interfaces.Decoder. The extra pool is the cross-attention's, for the last image of each row."""

    def __init__(self, model: IdeficsForVisionText2Text, image_id: int) -> None:
        """`image_id`: the token that stands for an image."""
        self.spec = cache_spec(model)
        text = TextModel(model)
        #: By whether nothing stands before the segments, and whether they are short.
        self._prefills = {
            (begins, is_short): Traced(Prefill(text, image_id, begins=begins, is_short=is_short))
            for begins, is_short in itertools.product((True, False), repeat=2)
        }
        self._scored_prefills = {
            is_short: Traced(ScoredPrefill(text, image_id, is_short=is_short)) for is_short in (True, False)
        }
        self._text_prefill = Traced(TextPrefill(text))
        self._scored_text_prefill = Traced(ScoredTextPrefill(text))
        self.step: Callable[..., Tensor] = TextStep(text, is_short=True)
        self.branch: Callable[..., Tensor] = TreeAttention(text)

    def segment(self, tokens: Tokens, features: Mapping[bytes, Tensor], carry: Tensor | None) -> IdeficsSegment:
        """See interfaces.Decoder. `features` (width, size) by key."""
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
        """See interfaces.Decoder."""
        length = max(len(segment.ids) for segment in segments)
        # Padding on the right: no kept token attends to it, and the next tokens overwrite it.
        ids = padded([segment.ids for segment in segments], length, 0, self.spec.device)
        numbers = self._numbers(segments, starts, slots)
        if not extra:
            return self._text_prefill(ids, *numbers[:2], *self_kv)
        prefill = self._prefills[not any(starts), length <= FEW]
        return prefill(ids, *numbers, *self._image_tensors(segments), *self_kv, *extra)

    def prefill_scored(
        self,
        segments: Sequence[IdeficsSegment],
        starts: Sequence[int],
        tree: TokenTree,
        firsts: Sequence[Sequence[int]],
        self_kv: Sequence[Tensor],
        extra: Sequence[Tensor],
    ) -> Tensor:
        """See interfaces.Decoder."""
        first = padded(firsts, max(map(len, firsts)), 0, self.spec.device)
        numbers = self._numbers(segments, starts, range(len(segments)))
        scored = tree.owner, tree.depth, first, tree.targets
        if not extra:
            return self._scored_text_prefill(tree.ids, *numbers[:2], *scored, *self_kv)
        score = self._scored_prefills[tree.ids.shape[1] <= FEW]
        return score(tree.ids, *numbers, *self._image_tensors(segments), *scored, *self_kv, *extra)

    def _numbers(
        self, segments: Sequence[IdeficsSegment], starts: Sequence[int], slots: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """`starts`, the segments' last tokens' places and `slots`, each (segments,)."""
        lasts = [len(segment.ids) - 1 for segment in segments]
        # One tensor, since each that is made lets go of the interpreter and has to get it back.
        return to_device([[*starts], lasts, [*slots]], self.spec.device).unbind()

    def _image_tensors(self, segments: Sequence[IdeficsSegment]) -> tuple[Tensor, ...]:
        """`images`, `shown`, `kept`, `no_image_before` and `first` of network.Prompts."""
        device = self.spec.device
        # Number 0, the image before, is left out where no token attends to it.
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
    """What is kept for each row of a model."""
    layers, blocks = model.model.layers, model.model.gated_cross_attn_layers
    self_attention, cross_attention = layers[0].self_attn, blocks[0].cross_attn
    width, size = feature_shape(model)
    # A quantized model's other weights are of another type.
    weight = model.model.norm.weight
    return CacheSpec(
        KVSpec(len(layers), self_attention.num_heads, self_attention.head_dim),
        weight.dtype,
        weight.device,
        (KVSpec(len(blocks), cross_attention.num_heads, cross_attention.head_dim, width),),
        width * size * weight.dtype.itemsize,
    )


def feature_shape(model: IdeficsForVisionText2Text) -> tuple[int, int]:
    """The width and the size of one image's features: the resampler's latents, or the vision tower's patches."""
    config = model.config
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    width = config.perceiver_config.resampler_n_latents if config.use_resampler else patches + 1
    return int(width), int(vision.embed_dim)
