"""Idefics2 and Idefics3 for stock transformers.

It encodes a picture for each job and beam that shows it, and pads all frames of a batch to the largest.
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
from worker.models.tokenizer import TextModel


class Idefics2And3Adapter:
    """One loaded checkpoint of either family."""

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, encoder: PictureEncoder | NoEncoder | None = None
    ) -> None:
        """`encoder`: what encodes the pictures of rows that a decoder of our own runs."""
        self.model = model
        self.codec = Idefics2And3Codec(processor, TextModel.of(model))
        encoder = encoder or NoEncoder()
        self.prefetch, self.help, self.metrics = encoder.prefetch, encoder.help, encoder.metrics

    def inputs(self, prompts: Sequence[Tokens]) -> dict[str, Tensor]:
        """See stock.Adapter. `pixel_values` (rows, frames, channels, height, width) and `pixel_attention_mask` (rows,
        frames, height, width) are left out if no prompt shows a picture."""
        inputs = self.codec.padded(prompts)
        if any(prompt.pictures for prompt in prompts):
            inputs |= _pixel_inputs([_frames(prompt) for prompt in prompts])
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    def forward_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """See stock.Adapter: the same."""
        return inputs

    def continuation_inputs(self, inputs: dict[str, Tensor], rows: Tensor, length: int) -> dict[str, Tensor]:
        """See stock_scoring.ForwardAdapter. The prompts' keys and values hold the pictures."""
        return {}


def _frames(prompt: Tokens) -> list[Frame]:
    """Each frame of a prompt's pictures."""
    return [frame for picture in prompt.pictures for frame in picture.frames]


def _pixel_inputs(rows: Sequence[Sequence[Frame]]) -> dict[str, Tensor]:
    """Rows of frames (channels, height, width) with masks (height, width) as a padded batch.

    `pixel_values` are (rows, frames, channels, height, width), `pixel_attention_mask` (rows, frames, height, width).
    The model skips frames of zeros.
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
