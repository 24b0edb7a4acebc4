"""Model families: one adapter each, and a fake beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from PIL.Image import Image

from tasks.payloads import ModelInfo
from worker.engine.engine import Beat, Newcomers
from worker.engine.row import Picture, Row, Tokens

#: Texts and pictures in reading order.
Parts = Sequence[str | Picture]


class Model(Protocol):
    """A loaded model: what a job thread asks of it, and what the engine does (`run`, see engine.Runner)."""

    info: ModelInfo
    #: Its prompts are a chat's turns: see worker.prompts.in_turns.
    in_turns: bool

    def picture(self, image: Image) -> Picture:
        """An RGB image as the model takes it. Called from many threads."""

    def look(self, pictures: Sequence[Picture]) -> int:
        """Wait until pictures are encoded, ahead of the engine. How many of them were known already."""

    def prepare(self, parts: Parts) -> Tokens:
        """A prompt's tokens and pictures. Called from many threads. Raises InvalidRequest."""

    def encode_labels(self, lead: Parts, labels: Sequence[str]) -> list[tuple[int, ...]]:
        """The token ids that continue a prompt with each label and its end. `lead` are the prompt's last parts, from an
        image on or all: texts before an image do not change how one behind it is split."""

    def end_ids(self, *, utterance: bool) -> frozenset[int]:
        """The tokens that end an answer; with `utterance` the instruct form's too."""

    def decode(self, ids: Sequence[int]) -> str:
        """New tokens as text, special tokens left out."""

    def figures(self) -> dict[str, int]:
        """Counters of its caches, for monitoring."""

    def run(self, rows: Sequence[Row], beat: Beat, newcomers: Newcomers) -> None: ...
