"""Dialogues as rows of tokens for training, with the tokens to be taught marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from worker.demo.dialogue import Dialogue, index_of
from worker.jobs.prompts import ImageRef
from worker.models.tokenizer import IMAGE

if TYPE_CHECKING:
    from worker.demo.training.family import Family

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
    """Padded rows: `ids`, `attention` and `weights` (rows, tokens), and `images` (rows, images), which are indices or
    -1. `image_id` is the token that stands for an image or a part of one."""

    ids: Tensor
    attention: Tensor
    images: Tensor
    weights: Tensor
    image_id: int


class RowMaker:
    """Turns dialogues into rows, with one family's tokenizer and form of prompts."""

    def __init__(self, family: Family, tokenizer: PreTrainedTokenizerFast) -> None:
        self._family, self._tokenizer = family, tokenizer
        self._image_id = tokenizer.convert_tokens_to_ids(IMAGE)

    def rows(self, dialogues: Sequence[Dialogue]) -> list[TrainingRow]:
        """A row for each dialogue."""
        prompts = [self._family.prompt(dialogue.job) for dialogue in dialogues]
        starts = [self._family.rendered(self._tokenizer, prompt) for prompt in prompts]
        texts = [self._family.spoken(start, dialogue) for start, dialogue in zip(starts, dialogues, strict=True)]
        encoded = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        rows = []
        for index, dialogue in enumerate(dialogues):
            start = starts[index]
            spans = [*self._family.shown_spans(start, dialogue), (len(start), len(texts[index]))]
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
        return MicroBatch(ids, attention, images, weights, self._image_id)


def _within(offset: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    return offset[0] < offset[1] and any(start <= offset[0] and offset[1] <= end for start, end in spans)
