"""Model families: one adapter each, and a fake beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from PIL.Image import Image

from tasks.payloads import ModelInfo
from worker.engine.engine import Beat, Newcomers
from worker.engine.row import Row, Tokens

#: Texts and RGB images in reading order.
Parts = Sequence[str | Image]


class Model(Protocol):
    """A loaded model: what a job thread asks of it, and what the engine does (`run`, see engine.Runner)."""

    info: ModelInfo

    def prepare(self, parts: Parts) -> Tokens:
        """A prompt's tokens and pictures. Called from many threads. Raises InvalidRequest."""

    def encode_label(self, parts: Parts, label: str) -> tuple[int, ...]:
        """The token ids that continue this prompt with a label and a newline."""

    def end_ids(self, *, utterance: bool) -> frozenset[int]:
        """The tokens that end an answer; with `utterance` the instruct form's too."""

    def decode(self, ids: Sequence[int]) -> str:
        """New tokens as text, special tokens left out."""

    def run(self, rows: Sequence[Row], beat: Beat, newcomers: Newcomers) -> None: ...
