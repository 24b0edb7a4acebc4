"""Prompts of Idefics2, Idefics3 and SmolVLM, as their processors write them.

A prompt is its texts, with pictures between them as the family's processor writes them. A checkpoint whose processor
has the families' chat template (`User:<image>...<end_of_utterance>`, newline, `Assistant:`) gets turns of that form,
behind the template's opening; any other one continues the guide's plain prompts.
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
from worker.models.tokenizer import FAKE, IMAGE, BaseCodec, TextModel

logger = logging.getLogger(__name__)


class Idefics2And3Codec(BaseCodec):
    """The prompts of a checkpoint of either family."""

    def __init__(self, processor: ProcessorMixin, model: TextModel) -> None:
        """Raises SetupFailed: see BaseCodec."""
        super().__init__(processor.tokenizer, model)
        self._processor = processor
        # Only in Idefics3 a picture's tokens depend on its size: Idefics2's processor expands each `<image>` itself.
        self._expands = isinstance(processor, Idefics3Processor)
        self._cutter = FrameCutter(processor.image_processor, splits_into_tiles=self._expands)
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
        frames, rows, columns = self._cutter.frames(image)
        if not self._expands:
            return replace(frames, text=IMAGE)
        placed = {"rows": [[rows]], "cols": [[columns]]}
        return replace(frames, text=self._processor.replace_image_token(placed, image_idx=0))

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
