"""Dialogues as rows of tokens for training, with the tokens to be taught marked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from worker.demo.dialogue import Dialogue, index_of
from worker.jobs.prompts import ImageRef, build
from worker.models.idefics1.adapter import render_prompt
from worker.models.tokenizer import IMAGE

#: Maximum tokens of a micro-batch, with padding: as many as two cores compute efficiently at once.
TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class TrainingRow:
    """A dialogue as token ids. `weights`: the weight of each token in the loss, 0 for tokens of the prompt."""

    ids: list[int]
    weights: list[float]
    images: list[int]


@dataclass(frozen=True)
class MicroBatch:
    """Padded rows: `ids`, `attention` and `weights` (rows, tokens), `image_mask` (rows, tokens, images), and `images`
    (rows, images), which are indices or -1."""

    ids: Tensor
    attention: Tensor
    image_mask: Tensor
    images: Tensor
    weights: Tensor


class RowMaker:
    """Turns dialogues into rows, with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._image_id = tokenizer.convert_tokens_to_ids(IMAGE)

    def rows(self, dialogues: Sequence[Dialogue]) -> list[TrainingRow]:
        """A row for each dialogue."""
        prompts = [build(dialogue.job) for dialogue in dialogues]
        starts = [render_prompt(self._tokenizer.bos_token, prompt) for prompt in prompts]
        texts = [spoken(start, dialogue.text) for start, dialogue in zip(starts, dialogues, strict=True)]
        encoded = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        rows = []
        for index, dialogue in enumerate(dialogues):
            spans = [*_shown_spans(texts[index], dialogue), (len(starts[index]), len(texts[index]))]
            taught = [_within(offset, spans) for offset in encoded["offset_mapping"][index]]
            # By its root: long stories count for more than one word, but do not drown it.
            weight = sum(taught) ** -0.5
            images = [index_of(item.source) for item in prompts[index] if isinstance(item, ImageRef)]
            rows.append(TrainingRow(encoded["input_ids"][index], [weight * each for each in taught], images))
        return rows

    def micro_batches(self, rows: Sequence[TrainingRow]) -> Iterator[MicroBatch]:
        """Group rows of similar length and number of images."""
        ordered = sorted(rows, key=lambda row: (len(row.images), len(row.ids)))
        group: list[TrainingRow] = []
        for row in ordered:
            if group and (len(group) + 1) * max(len(row.ids), *(len(each.ids) for each in group)) > TOKENS_AT_ONCE:
                yield self._collated(group)
                group = []
            group.append(row)
        yield self._collated(group)

    def _collated(self, rows: Sequence[TrainingRow]) -> MicroBatch:
        # Padding is on the right here and on the left in use: positions count from the first token in both.
        width, slots = max(len(row.ids) for row in rows), max(len(row.images) for row in rows)
        ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows])
        weights = torch.tensor([row.weights + [0.0] * (width - len(row.ids)) for row in rows])
        attention = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows])
        images = torch.tensor([row.images + [-1] * (slots - len(row.images)) for row in rows])
        latest = (ids == self._image_id).cumsum(1) - 1
        image_mask = (latest[..., None] == torch.arange(slots)).long() * attention[..., None]
        return MicroBatch(ids, attention, image_mask, images, weights)


def spoken(start: str, text: str) -> str:
    """Prompt and answer as one text: a blank between words, none after an image."""
    return f"{start}{'' if start.endswith('>') else ' '}{text}</s>"


def _shown_spans(text: str, dialogue: Dialogue) -> list[tuple[int, int]]:
    spans, position = [], text.find("Assistant:") if dialogue.kind == "few-shot" else 0
    position += dialogue.kind == "few-shot"
    for lead, answer in dialogue.shown:
        position = text.index(lead + answer, position) + len(lead)
        spans.append((position, position + len(answer)))
        position += len(answer)
    return spans


def _within(offset: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    return offset[0] < offset[1] and any(start <= offset[0] and offset[1] <= end for start, end in spans)
