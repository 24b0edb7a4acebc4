"""IDEFICS (the first family): prompts as its processor builds them, images encoded once each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import IdeficsForVisionText2Text, IdeficsProcessor

from worker.engine.encoder_cache import FeatureCache, Lookahead
from worker.engine.interfaces import Parts
from worker.engine.row import ImageSpan, Picture, Tokens
from worker.engine.traced import Traced
from worker.models.image_processor import Pixels
from worker.models.tokenizer import FAKE, IMAGE, Words, configured_ends


def spelled(bos: str, parts: Sequence[object]) -> str:
    """A prompt as IdeficsProcessor spells it: texts without outer blanks, all else is an image, between fake tokens."""
    text, after_image = bos, False
    for part in parts:
        if isinstance(part, str):
            text += part.strip(" ")
        else:
            text += IMAGE + FAKE if after_image else FAKE + IMAGE + FAKE
        after_image = not isinstance(part, str)
    return text


class IdeficsCodec(Words):
    """A checkpoint's prompts, token for token those of transformers' IdeficsProcessor."""

    def __init__(self, processor: IdeficsProcessor, ends: Sequence[int]) -> None:
        super().__init__(processor.tokenizer, ends)
        self._pixels = Pixels(processor.image_processor)
        #: The token that stands for an image.
        self.image_id: int = self.tokenizer.convert_tokens_to_ids(IMAGE)

    def prepare(self, parts: Parts) -> Tokens:
        """See `Codec`."""
        for part in parts:
            if isinstance(part, str):
                self.refuse_reserved(part)
        ids = self.prompt_ids(parts)
        self.refuse_smuggled(ids, parts)
        places = (place for place, id in enumerate(ids) if id == self.image_id)
        spans = tuple(ImageSpan(number, place, 1) for number, place in enumerate(places))
        return Tokens(ids, tuple(part for part in parts if isinstance(part, Picture)), spans)

    def prompt_ids(self, parts: Parts) -> tuple[int, ...]:
        """See Words."""
        (ids,) = self.tokens_of(self.text(parts))
        return ids

    def picture(self, image: Image) -> Picture:
        """See `Codec`."""
        return self._pixels.picture(image)

    def text(self, parts: Parts) -> str:
        """The whole prompt as text."""
        return spelled(self.tokenizer.bos_token, parts)

    def lead_text(self, lead: Parts) -> str:
        """See Words."""
        return self.text(lead)


class _ImageEncoder(torch.nn.Module):
    """The vision tower, and the resampler where there is one."""

    def __init__(self, model: IdeficsForVisionText2Text) -> None:
        super().__init__()
        self.tower = model.model.vision_model
        self.resampler = model.model.perceiver_resampler if model.config.use_resampler else torch.nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        """(n, channels, height, width) to (n, length, width)."""
        features: Tensor = self.resampler(self.tower(pixel_values=pixels).last_hidden_state)
        return features


class IdeficsAdapter:
    """One loaded IDEFICS checkpoint."""

    def __init__(
        self, model: IdeficsForVisionText2Text, processor: IdeficsProcessor, feature_cache_bytes: int = 2**29
    ) -> None:
        self.model = model
        self.codec = IdeficsCodec(processor, configured_ends(model))
        self._encoder = Traced(_ImageEncoder(model))
        self._features = FeatureCache(self._encode, feature_cache_bytes)
        self._ahead = Lookahead(self._features)
        self.look = self._ahead.look

    def catch_up(self, within_s: float) -> bool:
        """See engine.Runner. Two that encode on one GPU take as long as one."""
        return self.model.device.type == "cpu" and self._ahead.catch_up(within_s)

    def features(self, pictures: Iterable[Picture]) -> dict[bytes, Tensor]:
        """Each picture's features (length, width) by its key, computed where they are not known."""
        return self._features.get(pictures)

    def figures(self) -> dict[str, int]:
        """See FeatureCache."""
        return self._features.figures()

    def inputs(self, prompts: Sequence[Tokens]) -> dict[str, Tensor]:
        """Arguments of `generate` for a batch, padded on the left: `image_hidden_states` holds, for each row,
        the features of its pictures (rows, images, length, width)."""
        inputs = self.codec.padded(prompts)
        inputs["image_attention_mask"] = self._image_mask(inputs["input_ids"], prompts)
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        return {**inputs, "image_hidden_states": self._hidden_states(prompts)}

    def forward_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same as arguments of the model's forward, which has another name for each kind of features."""
        named = dict(inputs)
        features = named.pop("image_hidden_states")
        resampled = self.model.config.use_resampler
        return {**named, "perceiver_embeddings" if resampled else "image_encoder_embeddings": features}

    def _image_mask(self, ids: Tensor, prompts: Sequence[Tokens]) -> Tensor:
        """(rows, length, images): each token sees the image before it, and that one only."""
        images = max(1, *(len(prompt.pictures) for prompt in prompts))
        seen = (ids == self.codec.image_id).cumsum(dim=1)
        return (seen[..., None] == torch.arange(1, images + 1)).long()

    def _hidden_states(self, prompts: Sequence[Tokens]) -> Tensor:
        found = self._features.get(picture for prompt in prompts for picture in prompt.pictures)
        images = max(1, *(len(prompt.pictures) for prompt in prompts))
        shape = next(iter(found.values())).shape if found else (1, self._feature_width)
        states = torch.zeros(len(prompts), images, *shape, dtype=self.model.dtype, device=self.model.device)
        for row, prompt in enumerate(prompts):
            for place, picture in enumerate(prompt.pictures):
                states[row, place] = found[picture.key]
        return states

    @property
    def _feature_width(self) -> int:
        return int(self.model.config.vision_config.embed_dim)

    def _encode(self, pixels: Tensor) -> Tensor:
        return self._encoder(pixels.to(device=self.model.device, dtype=self.model.dtype))
