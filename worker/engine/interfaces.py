"""What the engine asks of a model, and what a family of models brings. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from tasks.results import ModelInfo
from worker.engine.generation import GenerationRules
from worker.engine.row import Picture, Row, Tokens

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from worker.engine.scoring import TokenTree

#: A prompt's texts and pictures in reading order.
Parts = Sequence[str | Picture]
#: Called at each step: the engine is alive.
SendHeartbeat = Callable[[], None]
#: Given the rows that run, returns those that join them now.
Admit = Callable[[Sequence[Row]], Sequence[Row]]


class Codec(Protocol):
    """Turns prompts into a model's tokens and pixels, and tokens into text, without the model's weights. Safe in
    threads."""

    #: Whether prompts have the form of a chat: see worker.jobs.prompts.in_turns.
    in_turns: bool

    def picture(self, image: Image) -> Picture:
        """An RGB image as the model takes it."""

    def min_token_count(self, parts: Parts) -> int:
        """A lower bound of a prompt's tokens, found without tokenizing it."""

    def prepare(self, parts: Parts) -> Tokens:
        """A prompt's tokens and pictures. Raises InvalidRequest."""

    def encode_labels(self, lead: Parts, labels: Sequence[str]) -> list[tuple[int, ...]]:
        """The token ids that continue a prompt with each label and its end.

        `lead` are the prompt's last parts, from a picture on, or all: texts before a picture do not change how a text
        behind it is tokenized. Raises InvalidRequest.
        """

    def eos_ids(self, *, utterance: bool) -> frozenset[int]:
        """The tokens that end an answer; with `utterance`, that of the instruct form too."""

    def decode(self, ids: Sequence[int]) -> str:
        """New tokens as text, special tokens left out."""


class Runner(Protocol):
    """Runs rows on a model."""

    def prefetch(self, pictures: Sequence[Picture], then: Callable[[int], None]) -> None:
        """Encode pictures before their row runs, then call `then`, in any thread, with the number of those that were
        known already. May be called in any thread."""

    def help(self, within_s: float) -> bool:
        """Encode some of the pictures that wait, in the engine's thread, in about `within_s` seconds. False if nothing
        was encoded. For an engine that has no row to run."""

    def run(self, rows: Sequence[Row], heartbeat: SendHeartbeat, admit: Admit) -> None:
        """Finish or fail each row as soon as its output is known, and call `heartbeat` at each step.

        Called in the engine's thread.

        A runner whose batches rows can join calls `admit` between its steps, and finishes the rows that join too.
        Raises OutOfMemory if the rows were too many, or any error of the model: the engine runs unfinished rows again
        in smaller batches, so that one row's error fails no other.
        """


class Model(Runner, Protocol):
    """A loaded model."""

    info: ModelInfo
    rules: GenerationRules

    @property
    def codec(self) -> Codec: ...

    def metrics(self) -> dict[str, int]:
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
