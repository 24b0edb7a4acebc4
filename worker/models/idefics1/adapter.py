"""IDEFICS, the first family: its prompts, its image encoder, and its inputs for stock `generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import IdeficsForVisionText2Text, IdeficsProcessor

from worker.engine.interfaces import PromptContent
from worker.engine.pauses import without_pauses
from worker.engine.row import ImageSpan, Picture, Tokens
from worker.engine.traced import Traced
from worker.models.encoding import PictureEncoder
from worker.models.image_processor import Pixels
from worker.models.tokenizer import FAKE, IMAGE, BaseCodec, CodecConfig


def render_prompt(bos: str, parts: Sequence[object]) -> str:
    """A prompt's text as IdeficsProcessor builds it: texts are stripped of spaces; any other part is an image, between
    fake tokens."""
    text, after_image = bos, False
    for part in parts:
        if isinstance(part, str):
            text += part.strip(" ")
        else:
            text += IMAGE + FAKE if after_image else FAKE + IMAGE + FAKE
        after_image = not isinstance(part, str)
    return text


class IdeficsCodec(BaseCodec):
    """Builds a checkpoint's prompts, token for token as transformers' IdeficsProcessor does."""

    def __init__(self, processor: IdeficsProcessor, model: CodecConfig) -> None:
        """Raises SetupFailed if the model has no embedding of a token that prompts need."""
        super().__init__(processor.tokenizer, model)
        self.pixels = Pixels(processor.image_processor)
        #: The token that stands for an image.
        self.image_id: int = self.tokenizer.convert_tokens_to_ids(IMAGE)

    def prepare(self, parts: PromptContent) -> Tokens:
        """Tokenize a prompt. Raises InvalidRequest for text that holds or becomes a reserved token."""
        for part in parts:
            if isinstance(part, str):
                self.refuse_reserved(part)
        ids = self.prompt_ids(parts)
        self.refuse_smuggled(ids, parts)
        places = (place for place, id in enumerate(ids) if id == self.image_id)
        spans = tuple(ImageSpan(number, place, 1) for number, place in enumerate(places))
        return Tokens(ids, tuple(part for part in parts if isinstance(part, Picture)), spans)

    def prompt_ids(self, parts: PromptContent) -> tuple[int, ...]:
        """The token ids of a whole prompt, unchecked."""
        (ids,) = self.tokens_of(self.text(parts))
        return ids

    def picture(self, image: Image) -> Picture:
        """An RGB image at the vision encoder's size."""
        return self.pixels.picture(image)

    def text(self, parts: PromptContent) -> str:
        """The whole prompt as text."""
        return render_prompt(self.tokenizer.bos_token, parts)

    def lead_text(self, lead: PromptContent) -> str:
        """A prompt's last parts as text."""
        return self.text(lead)


class _ImageEncoder(torch.nn.Module):
    """Normalising, the vision tower, and the resampler where there is one."""

    def __init__(self, model: IdeficsForVisionText2Text, normalized: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.normalized, self.dtype = normalized, model.dtype
        self.tower = model.model.vision_model
        self.resampler = model.model.perceiver_resampler if model.config.use_resampler else torch.nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        """From pixels (images, channels, height, width), as a Picture holds them, to features (images, width, size)."""
        values = self.normalized(pixels).to(self.dtype)
        features: Tensor = self.resampler(self.tower(pixel_values=values).last_hidden_state)
        return features


class IdeficsAdapter:
    """A loaded IDEFICS checkpoint for stock `generate`, and its cached image features for the decoder too."""

    def __init__(
        self, model: IdeficsForVisionText2Text, processor: IdeficsProcessor, feature_cache_bytes: int = 2**29
    ) -> None:
        self.model = model
        self.codec = IdeficsCodec(processor, CodecConfig.of(model))
        self._encoder = Traced(_ImageEncoder(model, self.codec.pixels.normalized))
        #: Caches the features (width, size) of each picture.
        self.pictures = PictureEncoder(self._encode, feature_cache_bytes, model.device)
        self.prefetch, self.help, self.metrics = self.pictures.prefetch, self.pictures.help, self.pictures.metrics

    def inputs(self, prompts: Sequence[Tokens]) -> dict[str, Tensor]:
        """Arguments of `generate` for left-padded prompts: `input_ids` and `attention_mask` (rows, length),
        `image_hidden_states` (rows, images, width, size), the features of each row's pictures, and
        `image_attention_mask` (rows, length, images), 1 where a token attends to an image."""
        inputs = self.codec.padded(prompts)
        inputs["image_attention_mask"] = self._image_mask(inputs["input_ids"], prompts)
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        return {**inputs, "image_hidden_states": self._hidden_states(prompts)}

    def forward_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn arguments of `generate` into arguments of the model's forward, of the same shapes: there the features
        have another name, which depends on whether there is a resampler."""
        named = dict(inputs)
        features = named.pop("image_hidden_states")
        resampled = self.model.config.use_resampler
        return {**named, "perceiver_embeddings" if resampled else "image_encoder_embeddings": features}

    def continuation_inputs(self, inputs: dict[str, Tensor], rows: Tensor, length: int) -> dict[str, Tensor]:
        """The family's arguments of the model's forward for `length` tokens after the prompts `rows` (rows,): features
        (rows, images, width, size), and `image_attention_mask` (rows, length, images) of the prompt's last token."""
        features = next(name for name in inputs if name.endswith("_embeddings"))
        mask = inputs["image_attention_mask"][rows]
        return {features: inputs[features][rows], "image_attention_mask": mask[:, -1:].expand(-1, length, -1)}

    def _image_mask(self, ids: Tensor, prompts: Sequence[Tokens]) -> Tensor:
        """The mask (rows, length, images) for `ids` (rows, length): 1 for the last image up to a token, otherwise 0."""
        images = max(1, *(len(prompt.pictures) for prompt in prompts))
        seen = (ids == self.codec.image_id).cumsum(dim=1)
        return (seen[..., None] == torch.arange(1, images + 1)).long()

    def _hidden_states(self, prompts: Sequence[Tokens]) -> Tensor:
        """The features (rows, images, width, size) of each prompt's pictures, padded with zeros."""
        found = without_pauses(self.pictures.features(picture for prompt in prompts for picture in prompt.pictures))
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

    def _encode(self, pictures: Sequence[Picture]) -> Sequence[Tensor]:
        """The features (width, size) of each picture."""
        pixels = torch.stack([picture.pixels for picture in pictures if picture.pixels is not None])
        # Normalised on the device, which gets bytes, a quarter of what the values take.
        return self._encoder(pixels.to(self.model.device)).unbind()
