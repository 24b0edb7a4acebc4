"""Idefics2 and Idefics3, including the first SmolVLM: a picture's features stand among the prompt's own tokens.

A prompt is its texts, with pictures between them as the family's processor writes them. A checkpoint whose processor
has the families' chat template (`User:<image>...<end_of_utterance>`, newline, `Assistant:`) gets turns of that form,
behind the template's opening; any other one continues the guide's plain prompts.

Both run through stock transformers, which encodes a picture for each job and beam that shows it, and pads all frames of
a batch to the largest.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import Idefics3Processor, PreTrainedModel, ProcessorMixin

from tasks.errors import InvalidRequest
from tasks.protocol import END_OF_UTTERANCE
from worker.engine.interfaces import Parts
from worker.engine.row import Picture, Tokens
from worker.models.tokenizer import FAKE, IMAGE, BaseCodec, configured_eos_ids

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Frames(Picture):
    """One image as the processor scales and splits it: `pixels` (frames, channels, height, width)."""

    pixels: Tensor
    #: (frames, height, width): False where a frame was padded to the largest.
    mask: Tensor
    #: What stands for the image in a prompt's text.
    text: str

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes + self.mask.nbytes


class Idefics2And3Codec(BaseCodec):
    """The prompts of a checkpoint of either family."""

    def __init__(self, processor: ProcessorMixin, eos_ids: Sequence[int]) -> None:
        """`eos_ids`: see BaseCodec."""
        super().__init__(processor.tokenizer, eos_ids)
        self._processor = processor
        # Only in Idefics3 a picture's tokens depend on its size: Idefics2's processor expands each `<image>` itself.
        self._expands = isinstance(processor, Idefics3Processor)
        self._tokenize = processor.tokenizer if self._expands else processor
        opening = _template_opening(processor)
        self.in_turns = opening is not None
        self._opening = opening or ""
        self.label_end = END_OF_UTTERANCE if self.in_turns else "\n"

    def picture(self, image: Image) -> Frames:
        """See interfaces.Codec."""
        keywords = {"return_row_col_info": True} if self._expands else {}
        made = self._processor.image_processor([[image]], return_tensors="pt", **keywords)
        text = self._processor.replace_image_token(made, image_idx=0) if self._expands else IMAGE
        pixels: Tensor = made["pixel_values"][0]
        mask: Tensor = made["pixel_attention_mask"][0].bool()
        # An upright picture and one across may have the same bytes.
        key = hashlib.blake2b(repr(tuple(pixels.shape)).encode(), digest_size=16)
        key.update(pixels.numpy().data)
        key.update(mask.numpy().data)
        return Frames(key.digest(), pixels, mask, text)

    def prepare(self, parts: Parts) -> Tokens:
        """See interfaces.Codec."""
        # Joined, since texts that follow one another could form a token together.
        self.refuse_reserved("".join(part if isinstance(part, str) else "\n" for part in parts))
        pictures = tuple(part for part in parts if isinstance(part, Frames))
        ids = self.prompt_ids(parts)
        self.refuse_smuggled(ids, parts)
        return Tokens(ids, pictures)

    def prompt_ids(self, parts: Parts) -> tuple[int, ...]:
        """See BaseCodec."""
        text = self._opening + "".join(part if isinstance(part, str) else part.text for part in parts)  # type: ignore[attr-defined]
        # A template may open with the token that the tokenizer would add.
        opened = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        try:
            [ids] = self._tokenize(text=[text], add_special_tokens=not opened)["input_ids"]
        except ValueError:
            # Idefics2's processor counts them itself.
            raise InvalidRequest(
                f"The text becomes {IMAGE} in the model's terms, which is reserved: remove it."
            ) from None
        return tuple(ids)

    def lead_text(self, lead: Parts) -> str:
        """See BaseCodec. A picture's last token stands for all of it: the whole would be tokenized for each label."""
        return "".join(part if isinstance(part, str) else FAKE for part in lead)

    def eos_ids(self, *, utterance: bool) -> frozenset[int]:
        """See interfaces.Codec. The end of an utterance ends these families' answers in any case."""
        return super().eos_ids(utterance=True)


class Idefics2And3Adapter:
    """One loaded checkpoint of either family."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        self.model = model
        self.codec = Idefics2And3Codec(processor, configured_eos_ids(model))

    def prefetch(self, pictures: Sequence[Picture], then: Callable[[int], None]) -> None:
        """See interfaces.Runner: no picture is encoded ahead, and none is kept."""
        then(0)

    def help(self, within_s: float) -> bool:
        """See interfaces.Runner."""
        return False

    def metrics(self) -> dict[str, int]:
        """See interfaces.Model."""
        return {}

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


def _frames(prompt: Tokens) -> list[tuple[Tensor, Tensor]]:
    """Each frame (channels, height, width) of a prompt's pictures, with its mask (height, width)."""
    pictures = [picture for picture in prompt.pictures if isinstance(picture, Frames)]
    return [frame for picture in pictures for frame in zip(picture.pixels, picture.mask, strict=True)]


def _pixel_inputs(rows: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
    """Rows of frames (channels, height, width) with masks (height, width) as a padded batch.

    `pixel_values` are (rows, frames, channels, height, width), `pixel_attention_mask` (rows, frames, height, width).
    The model skips frames of zeros.
    """
    frames = [pixels for row in rows for pixels, _ in row]
    size = (max(len(row) for row in rows), *(max(frame.shape[n] for frame in frames) for n in range(3)))
    values = torch.zeros(len(rows), *size)
    masks = torch.zeros(len(rows), size[0], *size[2:], dtype=torch.bool)
    for row, shown in enumerate(rows):
        for place, (pixels, mask) in enumerate(shown):
            _, height, width = pixels.shape
            values[row, place, :, :height, :width] = pixels
            masks[row, place, :height, :width] = mask
    return {"pixel_values": values, "pixel_attention_mask": masks}


def _template_opening(processor: ProcessorMixin) -> str | None:
    """What the chat template writes before the first turn. None without a template of the families' form."""
    if not processor.chat_template:
        return None
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": "A"}]}
    question = f"User:{IMAGE}Q{END_OF_UTTERANCE}\nAssistant:"
    try:
        written = processor.apply_chat_template([asked, said, asked], add_generation_prompt=True)
    except Exception as error:
        # A template is the checkpoint's own, and may raise any error.
        written = repr(error)
    opening, found, rest = str(written).partition(f"{question} A{END_OF_UTTERANCE}\n{question}")
    if not found or rest:
        logger.warning("The checkpoint's chat template has another form than its family's: prompts are plain text.")
        return None
    return opening
