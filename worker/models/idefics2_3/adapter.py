"""Idefics2, Idefics3 and SmolVLM for stock `generate`: features take the place of the image tokens' embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from worker.engine.row import Tokens
from worker.models.encoding import PictureEncoder
from worker.models.idefics2_3.codec import Idefics2And3Codec
from worker.models.tokenizer import CodecConfig


@dataclass(frozen=True, slots=True)
class MergedPrompts:
    """Implements stock_prefill.PaddedPrompts. Only the prompts' own tokens show pictures: later ones need no more than
    the keys and values of these."""

    ids: Tensor
    mask: Tensor
    #: (image tokens, hidden): the features of all rows' image tokens, row by row.
    features: Tensor
    #: (rows, length): for an image token, its index in `features`; otherwise -1.
    places: Tensor

    def forward_inputs(self, start: int, end: int) -> dict[str, Any]:
        """Forward's `mm_encoder_outputs`, the features of the image tokens from `start` to `end`; empty if there are
        none."""
        places = self.places[:, start:end]
        shown = places[places >= 0]
        if not len(shown):
            return {}
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=[self.features[shown]])}}

    def continuation_inputs(self, rows: Tensor, length: int) -> dict[str, Any]:
        """Empty."""
        return {}

    def generate_inputs(self) -> dict[str, Any]:
        """Empty. `generate` computes the prompts' last token only, which is never that of a picture."""
        return {}


class Idefics2And3Adapter:
    """A loaded checkpoint of Idefics2, Idefics3 or SmolVLM for stock `generate`."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        encoder: PictureEncoder,
        steady_tokens: int | None = None,
    ) -> None:
        """`encoder`: encodes the pictures, on the fast path too. `steady_tokens`: see engine/stock.Adapter."""
        self.model = model
        self.codec = Idefics2And3Codec(processor, CodecConfig.of(model))
        self.prefetch, self.help, self.metrics = encoder.prefetch, encoder.help, encoder.metrics
        self.encode = encoder.features
        self.steady_tokens = steady_tokens

    def padded(self, prompts: Sequence[Tokens], features: Mapping[bytes, Tensor]) -> MergedPrompts:
        """Prompts padded on the left, with the features (image tokens, hidden) of their pictures by key."""
        ids, mask = (tensor.to(self.model.device) for tensor in self.codec.padded(prompts))
        is_image = ids == self.model.config.image_token_id
        places = (is_image.flatten().cumsum(0).view_as(ids) - 1).masked_fill(~is_image, -1)
        none = torch.empty(0, self.model.config.get_text_config().hidden_size, device=self.model.device)
        shown = [features[picture.key].to(self.model.device) for prompt in prompts for picture in prompt.pictures]
        return MergedPrompts(ids, mask, torch.cat([none.to(self.model.dtype), *shown]), places)
