"""Model families: one adapter each, and a fake beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from PIL.Image import Image

from config.settings import Settings
from tasks.payloads import ModelInfo
from worker.engine.engine import Beat, Newcomers
from worker.engine.generation import GenerationRules
from worker.engine.row import Picture, Row, Tokens

DEMO = Path(__file__).parent.parent / "demo" / "checkpoint"


class SetupFailed(RuntimeError):
    """The model cannot be served; the message tells the cure."""


#: Texts and pictures in reading order.
Parts = Sequence[str | Picture]


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


class Model(Protocol):
    """A loaded model. `look`, `catch_up` and `run` are the engine's: see engine.Runner."""

    info: ModelInfo
    rules: GenerationRules

    @property
    def codec(self) -> Codec: ...

    def figures(self) -> dict[str, int]:
        """Counters of its caches, for monitoring."""

    def look(self, pictures: Sequence[Picture], then: Callable[[int], None]) -> None: ...

    def catch_up(self, within_s: float) -> bool: ...

    def run(self, rows: Sequence[Row], beat: Beat, newcomers: Newcomers) -> None: ...


def checkpoint_folder(settings: Settings) -> Path | None:
    """The local folder of the model, where it has one."""
    path = DEMO if settings.model == "demo" else Path(settings.model)
    return path if path.is_dir() else None
