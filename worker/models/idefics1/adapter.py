"""IDEFICS, the first family: its prompts, its image encoder, and its inputs for stock `generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import IdeficsForVisionText2Text, IdeficsProcessor

from worker.engine.interfaces import PromptContent
from worker.engine.row import ImageSpan, Picture, Tokens
from worker.engine.tensors import upload
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

    def __init__(self, model: IdeficsForVisionText2Text, pixels: Pixels) -> None:
        super().__init__()
        pixels.copy_to(model.device)
        self.normalized, self.dtype = pixels.normalized, model.dtype
        self.tower = model.model.vision_model
        self.resampler = model.model.perceiver_resampler if model.config.use_resampler else torch.nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        """From pixels (images, channels, height, width), as a Picture holds them, to features (images, width, size)."""
        values = self.normalized(pixels).to(self.dtype)
        features: Tensor = self.resampler(self.tower(pixel_values=values).last_hidden_state)
        return features


@dataclass(frozen=True, slots=True)
class IdeficsPrompts:
    """Implements stock_prefill.PaddedPrompts: the text model attends to the features of the last picture."""

    ids: Tensor
    mask: Tensor
    #: (rows, length, images): 1 where a token attends to an image.
    image_mask: Tensor
    #: (rows, images, width, size): the features of each row's pictures, padded with zeros.
    features: Tensor
    #: The name of the features among the arguments of the model's forward.
    features_name: str

    def forward_inputs(self, start: int, end: int) -> dict[str, Tensor]:
        """Forward's features (rows, images, width, size) and `image_attention_mask` (rows, end - start, images)."""
        return {self.features_name: self.features, "image_attention_mask": self.image_mask[:, start:end]}

    def continuation_inputs(self, rows: Tensor, length: int) -> dict[str, Tensor]:
        """Forward's features (rows, images, width, size), and `image_attention_mask` (rows, length, images) of the
        prompts' last token. `rows` (rows,): the indices of the prompts."""
        mask = self.image_mask[rows, -1:].expand(-1, length, -1)
        return {self.features_name: self.features[rows], "image_attention_mask": mask}

    def generate_inputs(self) -> dict[str, Tensor]:
        """`image_hidden_states` (rows, images, width, size) and `image_attention_mask` (rows, length, images)."""
        return {"image_hidden_states": self.features, "image_attention_mask": self.image_mask}


class IdeficsAdapter:
    """A loaded IDEFICS checkpoint for stock `generate`, and its cached image features for the decoder too."""

    #: Its rotary embedding depends on a token's position only.
    steady_tokens = None

    def __init__(
        self, model: IdeficsForVisionText2Text, processor: IdeficsProcessor, feature_cache_bytes: int = 2**29
    ) -> None:
        self.model = model
        self.codec = IdeficsCodec(processor, CodecConfig.of(model))
        self._encoder = Traced(_ImageEncoder(model, self.codec.pixels))
        pictures = PictureEncoder(self._encode, feature_cache_bytes, model)
        self.prefetch, self.help, self.metrics = pictures.prefetch, pictures.help, pictures.metrics
        #: The features (width, size) of each picture.
        self.encode = pictures.features

    def padded(self, prompts: Sequence[Tokens], features: Mapping[bytes, Tensor]) -> IdeficsPrompts:
        """Prompts padded on the left, with the features (width, size) of their pictures by key."""
        device = self.model.device
        ids, mask = self.codec.padded(prompts)
        return IdeficsPrompts(
            ids.to(device),
            mask.to(device),
            self._image_mask(ids, prompts).to(device),
            self._features(prompts, features),
            # Of forward's arguments; `generate` has one name for both.
            "perceiver_embeddings" if self.model.config.use_resampler else "image_encoder_embeddings",
        )

    def _image_mask(self, ids: Tensor, prompts: Sequence[Tokens]) -> Tensor:
        """The mask (rows, length, images) for `ids` (rows, length): 1 for the last image up to a token, otherwise 0."""
        images = max(1, *(len(prompt.pictures) for prompt in prompts))
        seen = (ids == self.codec.image_id).cumsum(dim=1)
        return (seen[..., None] == torch.arange(1, images + 1)).long()

    def _features(self, prompts: Sequence[Tokens], features: Mapping[bytes, Tensor]) -> Tensor:
        """The features (rows, images, width, size) of each prompt's pictures, padded with zeros."""
        images = max(1, *(len(prompt.pictures) for prompt in prompts))
        shape = next(iter(features.values())).shape if features else (1, self._feature_width)
        states = torch.zeros(len(prompts), images, *shape, dtype=self.model.dtype, device=self.model.device)
        for row, prompt in enumerate(prompts):
            for place, picture in enumerate(prompt.pictures):
                states[row, place] = features[picture.key]
        return states

    @property
    def _feature_width(self) -> int:
        return int(self.model.config.vision_config.embed_dim)

    def _encode(self, pictures: Sequence[Picture]) -> Sequence[Tensor]:
        """The features (width, size) of each picture."""
        pixels = torch.stack([picture.pixels for picture in pictures if picture.pixels is not None])
        # Normalised on the device, which gets bytes, a quarter of what the values take.
        return self._encoder(upload(pixels, self.model.device)).unbind()
