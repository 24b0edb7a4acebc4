"""Idefics2, Idefics3 and SmolVLM for stock `generate`.

On this path a picture is encoded again for each job and beam that shows it, and all frames of a batch are padded to the
largest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from worker.engine.row import Tokens
from worker.models.encoding import NoEncoder, PictureEncoder
from worker.models.idefics2_3.codec import Idefics2And3Codec
from worker.models.idefics2_3.frames import Frame
from worker.models.tokenizer import CodecConfig


class Idefics2And3Adapter:
    """A loaded checkpoint of Idefics2, Idefics3 or SmolVLM for stock `generate`."""

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, encoder: PictureEncoder | NoEncoder | None = None
    ) -> None:
        """`encoder`: encodes the pictures of rows that run on the fast path; None if the checkpoint has none."""
        self.model = model
        self.codec = Idefics2And3Codec(processor, CodecConfig.of(model))
        encoder = encoder or NoEncoder()
        self.prefetch, self.help, self.metrics = encoder.prefetch, encoder.help, encoder.metrics

    def inputs(self, prompts: Sequence[Tokens]) -> dict[str, Tensor]:
        """Arguments of `generate` for left-padded prompts: `input_ids` and `attention_mask` (rows, length); if a prompt
        shows a picture, also `pixel_values` (rows, frames, channels, height, width) and `pixel_attention_mask` (rows,
        frames, height, width)."""
        inputs = self.codec.padded(prompts)
        if any(prompt.pictures for prompt in prompts):
            inputs |= _pixel_inputs([_frames(prompt) for prompt in prompts])
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    def forward_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The arguments of the model's forward are those of `generate`."""
        return inputs

    def continuation_inputs(self, inputs: dict[str, Tensor], rows: Tensor, length: int) -> dict[str, Tensor]:
        """No arguments of the family's own: the prompts' keys and values hold the pictures."""
        return {}


def _frames(prompt: Tokens) -> list[Frame]:
    """The frames of all pictures of a prompt, in order."""
    return [frame for picture in prompt.pictures for frame in picture.frames]


def _pixel_inputs(rows: Sequence[Sequence[Frame]]) -> dict[str, Tensor]:
    """A padded batch of each row's frames (channels, height, width) and masks (height, width).

    Returns `pixel_values` (rows, frames, channels, height, width), normalised, and `pixel_attention_mask` (rows,
    frames, height, width). A row with fewer frames is filled up with frames of zeros, which the model skips.
    """
    frames = [frame.pixels for row in rows for frame in row]
    size = (max(len(row) for row in rows), *(max(frame.shape[n] for frame in frames) for n in range(3)))
    values = torch.zeros(len(rows), *size)
    masks = torch.zeros(len(rows), size[0], *size[2:], dtype=torch.bool)
    for row, shown in enumerate(rows):
        for place, frame in enumerate(shown):
            height, width = frame.mask.shape
            values[row, place, :, :height, :width] = frame.normalize(frame.pixels, frame.mask)
            masks[row, place, :height, :width] = frame.mask
    return {"pixel_values": values, "pixel_attention_mask": masks}
