"""Prompts of Idefics2, Idefics3 and SmolVLM, as their processors write them.

A prompt is its texts and, between them, its pictures as image tokens in the processor's form. A checkpoint whose
processor has the families' chat template (`User:<image>...<end_of_utterance>`, newline, `Assistant:`) gets chat turns
of that form after the template's opening. Any other checkpoint gets plain prompts to continue.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace

from PIL.Image import Image
from transformers import Idefics3Processor, ProcessorMixin

from tasks.errors import InvalidRequest
from tasks.protocol import END_OF_UTTERANCE
from worker.engine.interfaces import PromptContent
from worker.engine.row import ImageSpan, Tokens
from worker.models.idefics2_3.frames import FrameCutter, Frames
from worker.models.tokenizer import FAKE, IMAGE, BaseCodec, CodecConfig

logger = logging.getLogger(__name__)


class Idefics2And3Codec(BaseCodec):
    """Builds the prompts of a checkpoint, token for token as its processor does."""

    def __init__(self, processor: ProcessorMixin, model: CodecConfig) -> None:
        """Raises SetupFailed if the model has no embedding of a token that prompts need."""
        super().__init__(processor.tokenizer, model)
        self._processor = processor
        # In Idefics3 a picture's tokens depend on its size, so they are written here. Idefics2's processor expands each
        # `<image>` itself.
        self._expands = isinstance(processor, Idefics3Processor)
        self._cutter = FrameCutter(processor.image_processor, splits_into_tiles=self._expands)
        self._tokenize = processor.tokenizer if self._expands else processor
        opening = _template_opening(processor) if self.has_end_of_utterance else None
        self.has_chat_template = opening is not None
        self._opening = opening or ""
        self.label_end = END_OF_UTTERANCE if self.has_chat_template else "\n"

    def picture(self, image: Image) -> Frames:
        """An RGB image as frames, with the text that stands for it in a prompt."""
        if image.height == 1 and not self._expands:
            # Idefics2's processor halves it, and would divide by a height of 0.
            image = image.resize((image.width, 2))
        frames, rows, columns = self._cutter.frames(image)
        if not self._expands:
            return replace(frames, text=IMAGE)
        placed = {"rows": [[rows]], "cols": [[columns]]}
        return replace(frames, text=self._processor.replace_image_token(placed, image_idx=0))

    def prepare(self, parts: PromptContent) -> Tokens:
        """Tokenize a prompt. Raises InvalidRequest for text that holds or becomes a reserved token."""
        # Joined, since consecutive texts could form a token together.
        self.refuse_reserved("".join(part if isinstance(part, str) else "\n" for part in parts))
        pictures = tuple(part for part in parts if isinstance(part, Frames))
        ids = self.prompt_ids(parts)
        self.refuse_smuggled(ids, parts)
        return Tokens(ids, pictures, self._spans(ids, pictures))

    def _spans(self, ids: Sequence[int], pictures: Sequence[Frames]) -> tuple[ImageSpan, ...]:
        """The position of each picture among a prompt's tokens, from its first image token to its last."""
        places = iter([place for place, id in enumerate(ids) if id == self._processor.image_token_id])
        spans: list[ImageSpan] = []
        for number, picture in enumerate(pictures):
            shown = list(itertools.islice(places, len(picture.pixels) * self._processor.image_seq_len))
            spans.append(ImageSpan(number, shown[0], shown[-1] + 1 - shown[0]))
        return tuple(spans)

    def prompt_ids(self, parts: PromptContent) -> tuple[int, ...]:
        """The token ids of a whole prompt. Raises InvalidRequest if a text becomes an image token."""
        text = self._opening + "".join(part if isinstance(part, str) else part.text for part in parts)  # type: ignore[attr-defined]
        # The template's opening may have the token that the tokenizer would add.
        opened = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        try:
            [ids] = self._tokenize(text=[text], add_special_tokens=not opened)["input_ids"]
        except ValueError:
            # Idefics2's processor compares the number of image tokens with that of `<image>` in the text.
            raise InvalidRequest(f"The text becomes the token {IMAGE}, which is reserved: remove it.") from None
        return tuple(ids)

    def lead_text(self, lead: PromptContent) -> str:
        """A prompt's last parts as text. Only the last token of each picture is written, since the text is tokenized
        again for each label."""
        return "".join(part if isinstance(part, str) else FAKE for part in lead)


def _template_opening(processor: ProcessorMixin) -> str | None:
    """What the chat template writes before the first turn; None if there is no template of the families' form."""
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
        # A template is a program of the checkpoint's, and may raise any error.
        written = repr(error)
    opening, found, rest = str(written).partition(f"{question} A{END_OF_UTTERANCE}\n{question}")
    if not found or rest:
        logger.warning("The checkpoint's chat template differs from its family's, so prompts are plain text.")
        return None
    return opening
