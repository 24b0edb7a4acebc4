"""A row, the engine's unit of work: one job's prompt, and how to continue or score it."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

    from worker.engine.grammar import Grammar

FinishReason = Literal["stop", "length", "stop_sequence", "canceled", "deadline"]


class NotBegun(Exception):
    """The row was withdrawn before the model started it: another worker is to run its job."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a row is continued. Temperature 0 is greedy. `eos_ids`: the tokens that end the row."""

    max_new_tokens: int
    num_beams: int = 1
    temperature: float = 0.0
    top_p: float | None = None
    #: Truncations of the distribution, as in transformers' sampling; None does not truncate.
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    seed: int | None = None
    #: Changes of the logits before a token is chosen, in this order: see worker/engine/penalties.py. The checkpoint's
    #: repetition penalty applies if this one is None.
    logit_bias: tuple[tuple[int, float], ...] = ()
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    #: Number of likeliest tokens whose log-probabilities are returned with each new token's; None returns no token's.
    logprobs: int | None = None
    #: Number of answers: the best beams of a search, or so many samples, each a row of its own.
    answers: int = 1
    stop: tuple[str, ...] = ()
    eos_ids: frozenset[int] = frozenset()

    @property
    def changes_logits(self) -> bool:
        """Whether a bias or a penalty of the row's own changes its logits."""
        penalty = self.repetition_penalty not in (None, 1.0) or self.frequency_penalty or self.presence_penalty
        return bool(penalty or self.logit_bias)

    def with_seed(self) -> Sampling:
        """The same with a random seed if it is sampled without one, so that the answer can be repeated."""
        if self.temperature == 0 or self.seed is not None:
            return self
        # JavaScript reads integers of up to 53 bits exactly.
        return dataclasses.replace(self, seed=secrets.randbits(53))


@dataclass(frozen=True, slots=True)
class Picture:
    """One image at the size of its vision encoder: pixels (channels, height, width), bytes or normalised floats."""

    #: Hash of the content: equal pictures have equal keys.
    key: bytes
    #: None for the fake model, which ignores them.
    pixels: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels."""
        return 0 if self.pixels is None else self.pixels.nbytes

    @property
    def frames(self) -> Sequence[Any]:
        """What the encoder takes one by one: the whole picture, or the parts into which its family cuts it."""
        return (self,)


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """The position of a picture among a prompt's tokens."""

    #: Index of the picture in the prompt.
    image: int
    #: Position of the picture's first token, and its number of tokens.
    start: int
    length: int

    @property
    def end(self) -> int:
        """The position after the picture's last token."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Tokens:
    """A prompt's token ids, and its pictures in order."""

    ids: tuple[int, ...]
    pictures: tuple[Picture, ...] = ()
    #: Each picture's position, in order. May be empty for a family without a fast path.
    spans: tuple[ImageSpan, ...] = ()
    #: Whether several rows have this prompt: all but its last token is prefilled once for them.
    is_repeated: bool = False
    #: Content of the keys of cached prefixes: see `apart`.
    salt: bytes = b""

    def apart(self, salt: bytes) -> Tokens:
        """The same prompt, for which no cache of the engine has anything: the keys have `salt` in them."""
        pictures = tuple(dataclasses.replace(picture, key=salt + picture.key) for picture in self.pictures)
        return dataclasses.replace(self, pictures=pictures, salt=salt)

    def until(self, length: int) -> Tokens:
        """The first `length` tokens. `length` must not be within a picture."""
        images = self._images(length)
        return Tokens(self.ids[:length], self.pictures[:images], self.spans[:images])

    def behind(self, length: int) -> Tokens:
        """The tokens after the first `length`. `length` must not be within a picture."""
        images = self._images(length)
        spans = (ImageSpan(span.image - images, span.start - length, span.length) for span in self.spans[images:])
        return Tokens(self.ids[length:], self.pictures[images:], tuple(spans))

    def _images(self, length: int) -> int:
        """Number of pictures in the first `length` tokens."""
        return sum(span.end <= length for span in self.spans)


class TokenScore(NamedTuple):
    """A chosen token and its log-probability, and the likeliest tokens in its place with theirs, the likeliest first.

    Probabilities are those of the distribution from which a greedy row takes the likeliest token: after the forbidden
    tokens, the penalties and the checkpoint's rules, before temperature and truncation.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """The result of a finished row."""

    #: New tokens, without the one that ended the row.
    ids: tuple[int, ...]
    finish_reason: FinishReason
    #: Probabilities of the row's labels, in order.
    probabilities: tuple[float, ...] = ()
    #: Geometric mean of the probabilities of the new tokens and of the one that ended the row; None without any. Not
    #: compared, as the next: by rounding they depend on the other rows of the batch.
    confidence: float | None = field(default=None, compare=False)
    #: Scores of the new tokens, if the row asks for log-probabilities.
    scores: tuple[TokenScore, ...] = field(default=(), compare=False)
    #: The further answers of a row that asks for several.
    others: tuple[Output, ...] = ()

    @property
    def label(self) -> int | None:
        """The number of the likeliest label; None without labels."""
        return self.probabilities.index(max(self.probabilities)) if self.probabilities else None

    @property
    def is_interrupted(self) -> bool:
        """Whether a cancellation or the deadline ended the row: run again, it may have another end."""
        return self.finish_reason in ("canceled", "deadline")


@dataclass(slots=True, eq=False)
class Row:
    """A job in the engine. A row with `labels`, the token ids of each, is scored and not continued."""

    tokens: Tokens
    sampling: Sampling
    labels: tuple[tuple[int, ...], ...] = ()
    priority: int = 5
    #: time.monotonic() at which the row ends with the tokens so far.
    deadline: float | None = None
    canceled: bool = False
    #: What its text keeps to; None: to nothing.
    grammar: Grammar | None = None
    #: The first row of a job that asks for several samples; with it, the others are canceled.
    leader: Row | None = None
    #: Whether no other row may share its batch.
    alone: bool = False
    #: Whether it is canceled once another row waits. For a row that runs alone.
    gives_way: bool = False
    #: Whether its output is that of an identical row.
    is_reused: bool = False
    #: Number of pictures whose features were cached.
    cached_images: int = 0
    #: time.monotonic(). 0.0 until its pictures are encoded (`ready`), it runs (`started`), it has a new token
    #: (`first_token`).
    arrived: float = field(default_factory=time.monotonic)
    ready: float = 0.0
    started: float = 0.0
    first_token: float = 0.0
    #: The new tokens so far, for other threads: a list to which its tokens are appended, and another one when it begins
    #: anew. Empty while it searches with beams.
    new_tokens: list[int] = field(default_factory=list)
    output: Future[Output] = field(default_factory=Future)

    @property
    def is_done(self) -> bool:
        """Whether the row has its output or error."""
        return self.output.done()

    @property
    def is_canceled(self) -> bool:
        """Whether the row, or the one that leads it, was canceled."""
        return self.canceled or (self.leader is not None and self.leader.canceled)

    @property
    def max_steps(self) -> int:
        """Maximum decode steps of the row."""
        return 0 if self.labels else self.sampling.max_new_tokens

    @property
    def is_prefilled(self) -> bool:
        """Whether the row has a token, so its prompt was prefilled. A row with labels ends when its prompt is."""
        return self.first_token > 0

    def abort_reason(self, now: float) -> FinishReason | None:
        """Why the row should end before the model ends it; None if it should go on. `now`: time.monotonic()."""
        if self.is_canceled:
            return "canceled"
        return "deadline" if self.deadline is not None and now >= self.deadline else None

    def finish(self, output: Output) -> None:
        """Resolve the row."""
        self.output.set_result(output)

    def fail(self, error: BaseException) -> None:
        """Resolve the row with an error."""
        self.output.set_exception(error)


def urgency(row: Row) -> tuple[int, float]:
    """A key that orders rows, the most urgent first, and among equals the oldest."""
    return row.priority, row.arrived
