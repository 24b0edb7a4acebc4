"""Prompts of Idefics2, Idefics3 and SmolVLM, as their processors write them.

A prompt is its texts, with pictures between them as the family's processor writes them. A checkpoint whose processor
has the families' chat template (`User:<image>...<end_of_utterance>`, newline, `Assistant:`) gets turns of that form,
behind the template's opening; any other one continues the guide's plain prompts.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL.Image import Image
from torch import Tensor
from transformers import Idefics3Processor, ProcessorMixin

from tasks.errors import InvalidRequest
from tasks.protocol import END_OF_UTTERANCE
from worker.engine.interfaces import PromptContent
from worker.engine.row import ImageSpan, Picture, Tokens
from worker.models.tokenizer import FAKE, IMAGE, BaseCodec, TextModel

logger = logging.getLogger(__name__)


class Frame(NamedTuple):
    """A part of an image, which the vision tower takes for itself."""

    #: (channels, height, width)
    pixels: Tensor
    #: (height, width): see Frames.
    mask: Tensor


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

    @property
    def frames(self) -> Sequence[Frame]:
        """See Picture."""
        return [Frame(*parts) for parts in zip(self.pixels, self.mask, strict=True)]


class Idefics2And3Codec(BaseCodec):
    """The prompts of a checkpoint of either family."""

    def __init__(self, processor: ProcessorMixin, model: TextModel) -> None:
        """Raises SetupFailed: see BaseCodec."""
        super().__init__(processor.tokenizer, model)
        self._processor = processor
        # Only in Idefics3 a picture's tokens depend on its size: Idefics2's processor expands each `<image>` itself.
        self._expands = isinstance(processor, Idefics3Processor)
        self._tokenize = processor.tokenizer if self._expands else processor
        opening = _template_opening(processor) if self.has_end_of_utterance else None
        self.has_chat_template = opening is not None
        self._opening = opening or ""
        self.label_end = END_OF_UTTERANCE if self.has_chat_template else "\n"

    def picture(self, image: Image) -> Frames:
        """See interfaces.Codec."""
        if image.height == 1 and not self._expands:
            # Idefics2's processor cuts it into halves, and divides by their height.
            image = image.resize((image.width, 2))
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

    def prepare(self, parts: PromptContent) -> Tokens:
        """See interfaces.Codec."""
        # Joined, since texts that follow one another could form a token together.
        self.refuse_reserved("".join(part if isinstance(part, str) else "\n" for part in parts))
        pictures = tuple(part for part in parts if isinstance(part, Frames))
        ids = self.prompt_ids(parts)
        self.refuse_smuggled(ids, parts)
        return Tokens(ids, pictures, self._spans(ids, pictures))

    def _spans(self, ids: Sequence[int], pictures: Sequence[Frames]) -> tuple[ImageSpan, ...]:
        """Where the pictures stand among a prompt's tokens: from the first image token of each to its last."""
        places = iter([place for place, id in enumerate(ids) if id == self._processor.image_token_id])
        spans: list[ImageSpan] = []
        for number, picture in enumerate(pictures):
            shown = list(itertools.islice(places, len(picture.pixels) * self._processor.image_seq_len))
            spans.append(ImageSpan(number, shown[0], shown[-1] + 1 - shown[0]))
        return tuple(spans)

    def prompt_ids(self, parts: PromptContent) -> tuple[int, ...]:
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

    def lead_text(self, lead: PromptContent) -> str:
        """See BaseCodec. A picture's last token stands for all of it: the whole would be tokenized for each label."""
        return "".join(part if isinstance(part, str) else FAKE for part in lead)


def _template_opening(processor: ProcessorMixin) -> str | None:
    """What the chat template writes before the first turn. None without a template of the families' form."""
    template = None if processor.chat_template else processor.tokenizer.chat_template
    if not processor.chat_template and not template:
        return None
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": "A"}]}
    question = f"User:{IMAGE}Q{END_OF_UTTERANCE}\nAssistant:"
    try:
        written = processor.apply_chat_template(
            [asked, said, asked], chat_template=template, add_generation_prompt=True
        )
    except Exception as error:
        # A template is the checkpoint's own, and may raise any error.
        written = repr(error)
    opening, found, rest = str(written).partition(f"{question} A{END_OF_UTTERANCE}\n{question}")
    if not found or rest:
        logger.warning("The checkpoint's chat template has another form than its family's: prompts are plain text.")
        return None
    return opening
