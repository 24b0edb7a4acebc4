"""A row, the engine's unit of work: one job's prompt, and how to continue or score it."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "stop_sequence", "canceled", "deadline"]


class NotBegun(Exception):
    """The row was withdrawn before the model started it: another worker is to run its job."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a row is continued. Temperature 0 is greedy. `eos_ids` are the tokens that end it."""

    max_new_tokens: int
    num_beams: int = 1
    temperature: float = 0.0
    top_p: float | None = None
    #: Truncation of the distribution as in transformers' sampling, by its names; None truncates nothing.
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    eos_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Picture:
    """One image as the vision tower takes it: float pixels (channels, height, width)."""

    #: Hash of the content: equal pictures have equal keys.
    key: bytes
    #: None for the fake model, which ignores them.
    pixels: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        return 0 if self.pixels is None else self.pixels.nbytes


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Where a picture stands among a prompt's tokens."""

    #: Its number among the prompt's pictures.
    image: int
    #: Its first token's place, and how many tokens it takes.
    start: int
    length: int

    @property
    def end(self) -> int:
        """The place behind its last token."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Tokens:
    """A prompt's token ids, and its pictures in the order of their tokens."""

    ids: tuple[int, ...]
    pictures: tuple[Picture, ...] = ()
    #: Each picture's place, in order; may be left out for a model without a decoder of ours.
    spans: tuple[ImageSpan, ...] = ()

    def until(self, length: int) -> Tokens:
        """The first `length` tokens, which cut no picture."""
        images = self._images(length)
        return Tokens(self.ids[:length], self.pictures[:images], self.spans[:images])

    def behind(self, length: int) -> Tokens:
        """The tokens behind the first `length`, which cut no picture."""
        images = self._images(length)
        spans = (ImageSpan(span.image - images, span.start - length, span.length) for span in self.spans[images:])
        return Tokens(self.ids[length:], self.pictures[images:], tuple(spans))

    def _images(self, length: int) -> int:
        """Pictures among the first `length` tokens."""
        return sum(span.end <= length for span in self.spans)


@dataclass(frozen=True, slots=True)
class Output:
    """The result of a finished row."""

    #: New tokens, without the one that ended the row.
    ids: tuple[int, ...]
    finish_reason: FinishReason
    #: Of the row's labels, in their order.
    probabilities: tuple[float, ...] = ()


@dataclass(slots=True, eq=False)
class Row:
    """A job in the engine. With `labels`, the token ids of each, it is scored and not continued."""

    tokens: Tokens
    sampling: Sampling
    labels: tuple[tuple[int, ...], ...] = ()
    priority: int = 5
    #: time.monotonic() at which the row ends with the tokens that it has.
    deadline: float | None = None
    canceled: bool = False
    #: Pictures that were not encoded for this row.
    cached_images: int = 0
    #: time.monotonic(); `started` is 0.0 until the row runs.
    arrived: float = field(default_factory=time.monotonic)
    started: float = 0.0
    output: Future[Output] = field(default_factory=Future)

    @property
    def is_done(self) -> bool:
        return self.output.done()

    @property
    def max_steps(self) -> int:
        """Decode steps that the row may take."""
        return 0 if self.labels else self.sampling.max_new_tokens

    def abort_reason(self, now: float) -> FinishReason | None:
        """Why the row should end at time.monotonic() `now` before the model ends it; None if it should not."""
        if self.canceled:
            return "canceled"
        return "deadline" if self.deadline is not None and now >= self.deadline else None

    def finish(self, output: Output) -> None:
        """Resolve the row."""
        self.output.set_result(output)

    def fail(self, error: BaseException) -> None:
        """Resolve the row with an error."""
        self.output.set_exception(error)
