"""What the engine asks of a model, and what a family of models brings. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from tasks.payloads import ModelInfo
from worker.engine.generation import GenerationRules
from worker.engine.row import Picture, Row, Tokens

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from worker.engine.scoring import TokenTree

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


@dataclass(frozen=True, slots=True)
class KVSpec:
    """The keys and values of a group of layers."""

    layers: int
    #: Key and value heads of a layer.
    heads: int
    head_size: int
    #: Positions of each row; 0: one for each of its tokens.
    width: int = 0


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """What a decoder keeps for each row."""

    self_kv: KVSpec
    dtype: torch.dtype
    device: torch.device
    #: Pools of fixed width, for rows whose piece has a `carry`: the keys and values that it is projected to.
    extra: tuple[KVSpec, ...] = ()
    #: Bytes of a piece's `carry` at most.
    carry_bytes: int = 0


class Piece(Protocol):
    """Consecutive tokens of a prompt, with the features of the pictures among them."""

    @property
    def ids(self) -> Sequence[int]:
        """The tokens."""

    @property
    def carry(self) -> Tensor | None:
        """What the tokens behind this piece need beside its keys and values. None: nothing, and the row has no content
        in the extra pools."""

    def split(self, length: int) -> tuple[Self, Self]:
        """The first `length` tokens, and the rest."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prompt's beginning, prefilled."""

    #: Keys and values (heads, length, head size) of each layer in turn.
    tensors: tuple[Tensor, ...]
    carry: Tensor | None

    @property
    def length(self) -> int:
        """Tokens."""
        return int(self.tensors[0].shape[1])

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors) + (0 if self.carry is None else self.carry.nbytes)


@dataclass(frozen=True, slots=True)
class PendingPrompt:
    """What is still to be prefilled of a prompt, and the prefix that it follows."""

    piece: Piece
    prefix: Prefix | None = None

    @property
    def start(self) -> int:
        """Tokens of the prefix."""
        return self.prefix.length if self.prefix else 0


#: The features of each distinct picture by its key, encoded where they are not known.
Encode = Callable[[Iterable[Picture]], Mapping[bytes, "Tensor"]]


class Decoder(Protocol):
    """A family's text decoder as stateless functions of tensors. The engine keeps what they read and write.

    `self_kv` and `extra` are keys and values of each layer in turn, each (slots, heads, positions, head size), with
    room for the new tokens: the functions store there. `extra` is empty where no row has content in the extra pools.
    `step` and `branch` take tensors alone and look at no content, so that the engine can record them as graphs.
    """

    spec: CacheSpec
    #: `step(numbers, *self_kv, *extra)` appends a token to each row: logits (rows, vocabulary) of the next. `numbers`
    #: (3, rows) are each row's token, how many stand before it, and whether it has content in the extra pools. Row n
    #: has slot n.
    step: Callable[..., Tensor]
    #: `branch(ids, starts, targets, owner, depth, has_extra, *self_kv, *extra)` runs a TokenTree's tensors behind each
    #: row: log-probabilities (rows, targets). `starts` and `has_extra` (rows,) as for `step`.
    branch: Callable[..., Tensor]

    def piece(self, tokens: Tokens, features: Mapping[bytes, Tensor], carry: Tensor | None) -> Piece:
        """Tokens with the features of their pictures, behind a piece with this carry."""

    def prefill(
        self,
        pieces: Sequence[Any],
        starts: Sequence[int],
        slots: Sequence[int],
        self_kv: Sequence[Tensor],
        extra: Sequence[Tensor],
    ) -> Tensor:
        """Store pieces (of `piece`) in `slots`, behind `starts` tokens each: logits (pieces, vocabulary) after the last
        token of each. Where `extra` is empty, `slots` are all in order, and no piece has a carry."""

    def prefill_scored(
        self,
        pieces: Sequence[Any],
        starts: Sequence[int],
        tree: TokenTree,
        firsts: Sequence[Sequence[int]],
        self_kv: Sequence[Tensor],
        extra: Sequence[Tensor],
    ) -> Tensor:
        """Store pieces that all have a carry in the first slots, and score sequences behind them: log-probabilities
        (rows, firsts and targets) of `firsts` after each piece, then of the tree's targets. The tree's ids begin with
        the pieces'."""
