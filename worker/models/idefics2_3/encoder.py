"""Image features of Idefics2, Idefics3 and SmolVLM, computed frame by frame.

Stock transformers pads all frames of a batch to the largest. Here an Idefics2 frame is encoded without its padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Idefics2ForConditionalGeneration, PreTrainedModel

from worker.engine.tensors import upload
from worker.engine.traced import Traced
from worker.models.idefics2_3.frames import Frame, Normalizer

#: Maximum patches encoded at once: on a CPU they take seconds, in which no heartbeat is sent.
CHUNK_PATCHES = 4096


class FrameEncoder:
    """Encodes frames with a checkpoint's vision tower and connector."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model
        self._resamples = isinstance(model, Idefics2ForConditionalGeneration)
        self._patch_size: int = model.config.vision_config.patch_size
        patches = (model.config.vision_config.image_size // self._patch_size) ** 2
        #: Maximum frames encoded at once, if all have the largest size.
        self.chunk = max(1, CHUNK_PATCHES // patches)
        self._run = Traced(_Encoder(model, resamples=self._resamples))

    def encode(self, frames: Sequence[Frame]) -> list[Tensor]:
        """The features (tokens, hidden) of each frame. Frames of one size are encoded together."""
        found: dict[int, Tensor] = {}
        cropped = [self._cropped(frame.pixels, frame.mask) for frame in frames]
        for shape in sorted({pixels.shape for pixels, _ in cropped}):
            places = [place for place, (pixels, _) in enumerate(cropped) if pixels.shape == shape]
            pixels, mask = (torch.stack(part) for part in zip(*(cropped[place] for place in places), strict=True))
            found.update(zip(places, self._together(pixels, mask, frames[0].normalize), strict=True))
        return [found[place] for place in range(len(frames))]

    def _cropped(self, pixels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """A frame (channels, height, width) and its mask (height, width) without the padding on the right and below.
        Idefics3 keeps the padding: there a frame has the same number of tokens at any size."""
        if not self._resamples:
            return pixels, mask
        # Patches that lie partly in the padding are left out, as the model does.
        height, width = (int(mask.any(dim=dim).sum()) // self._patch_size * self._patch_size for dim in (1, 0))
        return pixels[:, :height, :width], mask[:height, :width]

    def _together(self, pixels: Tensor, mask: Tensor, normalize: Normalizer) -> Sequence[Tensor]:
        """The features (tokens, hidden) of each of `pixels` (frames, channels, height, width), which `mask` (frames,
        height, width) tells from padding."""
        device, dtype = self._model.device, self._model.dtype
        # Normalised on the device: bytes are a quarter of the normalised values, and faster to transfer. The mask is
        # read in the host's memory.
        if mask.all():
            return self._run(normalize(upload(pixels, device)).to(dtype)).unbind()
        shown = upload(mask, device)
        values = normalize(upload(pixels, device), shown).to(dtype)
        found = self._model.model.get_image_features(values[:, None], shown[:, None])
        return found.pooler_output  # type: ignore[no-any-return]


class _Encoder(torch.nn.Module):
    """The vision tower and the connector, for frames without padding."""

    def __init__(self, model: Any, *, resamples: bool) -> None:
        super().__init__()
        self.tower = model.model.vision_model
        self.connector = model.model.connector
        self.resamples = resamples

    def forward(self, pixels: Tensor) -> Tensor:
        """From pixels (frames, channels, height, width) to features (frames, tokens, hidden)."""
        frames, _, height, width = pixels.shape
        size = self.tower.embeddings.patch_size
        shown = torch.ones(frames, height // size, width // size, dtype=torch.bool, device=pixels.device)
        states = self.tower.embeddings(pixel_values=pixels, patch_attention_mask=shown)
        states = self.tower.encoder(inputs_embeds=states, attention_mask=None).last_hidden_state
        states = self.tower.post_layernorm(states)
        features: Tensor = self.connector(states, shown.flatten(1)) if self.resamples else self.connector(states)
        return features
