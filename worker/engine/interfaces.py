"""What the engine asks of a model, and what a family of models brings. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from tasks.payloads import ModelInfo
from worker.engine.generation import GenerationRules
from worker.engine.row import Picture, Row, Tokens

if TYPE_CHECKING:
    from PIL.Image import Image

#: Texts and pictures in reading order.
Parts = Sequence[str | Picture]
#: Called at each step: a sign of life.
Beat = Callable[[], None]
#: Given the rows that run, those that may join them now.
Newcomers = Callable[[Sequence[Row]], Sequence[Row]]


class Codec(Protocol):
    """What turns jobs into a model's terms and back, without its weights. Used from many threads."""

    #: Its prompts are a chat's turns: see worker.jobs.prompts.in_turns.
    in_turns: bool

    def picture(self, image: Image) -> Picture:
        """An RGB image as the model takes it."""

    def least_tokens(self, parts: Parts) -> int:
        """So many tokens a prompt has at least, found without splitting it into them."""

    def prepare(self, parts: Parts) -> Tokens:
        """A prompt's tokens and pictures. Raises InvalidRequest."""

    def encode_labels(self, lead: Parts, labels: Sequence[str]) -> list[tuple[int, ...]]:
        """The token ids that continue a prompt with each label and its end. `lead` are the prompt's last parts, from an
        image on or all: texts before an image do not change how one behind it is split."""

    def end_ids(self, *, utterance: bool) -> frozenset[int]:
        """The tokens that end an answer; with `utterance` the instruct form's too."""

    def decode(self, ids: Sequence[int]) -> str:
        """New tokens as text, special tokens left out."""


class Runner(Protocol):
    """Runs rows on a model."""

    def look(self, pictures: Sequence[Picture], then: Callable[[int], None]) -> None:
        """Encode pictures ahead of their row's turn, then call `then`, in any thread, with how many were known already.

        Called from any thread.
        """

    def catch_up(self, within_s: float) -> bool:
        """Encode some of the pictures that wait, in the engine's thread while that has nothing to run, in about so many
        seconds. False where that makes nobody's turn come sooner."""

    def run(self, rows: Sequence[Row], beat: Beat, newcomers: Newcomers) -> None:
        """Finish or fail each row, as soon as it is known; call `beat` at each step. From the engine's thread only.

        A runner whose batches rows can join asks for newcomers between its steps, and finishes those too.
        Raises OutOfMemory where the rows were too many, or any error of the model: the engine runs what is not
        finished again in smaller batches, so that one row's fault stays its own.
        """


class Model(Runner, Protocol):
    """A loaded model."""

    info: ModelInfo
    rules: GenerationRules

    @property
    def codec(self) -> Codec: ...

    def figures(self) -> dict[str, int]:
        """Counters of its caches, for monitoring."""
