"""Protocols between the engine and the families of models. This module does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from tasks.results import ModelInfo
from worker.engine.blocks import BLOCK_TOKENS
from worker.engine.generation_rules import GenerationRules
from worker.engine.pauses import Pauses
from worker.engine.row import Picture, Row, Tokens

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from worker.engine.grammar import GrammarTokens
    from worker.engine.scoring import TokenTree

#: A prompt's texts and pictures, in reading order.
PromptContent = Sequence[str | Picture]
#: What runs a row: the worker's own decoder with continuous batching, or transformers' `generate`.
EnginePath = Literal["continuous", "stock", "fake"]
#: Called at each step to show that the engine is alive.
SendHeartbeat = Callable[[], None]
#: Takes the running rows and returns the rows that join them now.
Admit = Callable[[Sequence[Row]], Sequence[Row]]


class Codec(Protocol):
    """Turns prompts into a model's tokens and pixels, and tokens into text. Needs no weights. Thread-safe."""

    #: Whether prompts are written as chats, with worker.jobs.prompts.in_turns.
    has_chat_template: bool
    #: Whether `<end_of_utterance>` is a token of the model.
    has_end_of_utterance: bool
    #: Positions of the model, for a prompt and its answer.
    context_tokens: int
    #: The ids of the tokens that end an answer, that of `<end_of_utterance>` among them.
    eos_ids: frozenset[int]
    #: Number of the model's tokens: ids are below it.
    vocabulary: int
    #: The ids of special tokens that do not end an answer.
    reserved_ids: frozenset[int]

    def picture(self, image: Image) -> Picture:
        """Scale an RGB image for the model."""

    def min_token_count(self, parts: PromptContent) -> int:
        """A lower bound of a prompt's number of tokens, found without tokenizing it."""

    def prepare(self, parts: PromptContent) -> Tokens:
        """Tokenize a prompt. Raises InvalidRequest, as for text that becomes a reserved token."""

    def encode_labels(self, lead: PromptContent, labels: Sequence[str]) -> list[tuple[int, ...]]:
        """The token ids of each label, with its end, as they continue a prompt.

        `lead`: the end of the prompt, from its last picture on, or the whole prompt. Texts before a picture do not
        change how a text after it is tokenized. Raises InvalidRequest.
        """

    def grammar_tokens(self) -> GrammarTokens | None:
        """What grammars are compiled for; None if the model does not keep to any. Takes up to a second."""

    def decode(self, ids: Sequence[int]) -> str:
        """Turn new tokens into text, without special tokens."""

    def token_text(self, id: int) -> str:
        """The text that one token adds to an answer; a special token's name."""


class Runner(Protocol):
    """Runs rows on a model."""

    def prefetch(self, pictures: Sequence[Picture], then: Callable[[int], None]) -> None:
        """Encode pictures before their row runs, then call `then` with the number of pictures that were cached.

        Thread-safe. `then` may be called in any thread.
        """

    def help(self, within_s: float) -> bool:
        """Encode waiting pictures in the engine's thread for about `within_s` seconds, while no row can run or a few
        wait for more.

        Returns False if nothing was encoded.
        """

    def run(self, rows: Sequence[Row], heartbeat: SendHeartbeat, admit: Admit) -> None:
        """Run rows to their end; finish or fail each row as soon as its output is known. For the engine's thread.

        Call `heartbeat` at each step. A runner that supports joining also calls `admit` between steps, and runs the
        rows that `admit` returns. Raises OutOfMemory if the batch was too large, or any error of the model. The engine
        then runs the unfinished rows again in smaller batches, so that one row's error does not fail the others.
        """


class Model(Runner, Protocol):
    """A loaded model."""

    info: ModelInfo
    rules: GenerationRules

    @property
    def codec(self) -> Codec: ...

    def path(self, row: Row) -> EnginePath:
        """What runs a row."""

    def metrics(self) -> dict[str, int]:
        """Counters of the model's caches, for monitoring."""


@dataclass(frozen=True, slots=True)
class KVSpec:
    """Shape of the keys and values of a group of layers."""

    layers: int
    #: Key and value heads of a layer.
    heads: int
    head_size: int
    #: Positions for each row; 0 means one for each of its tokens.
    width: int = 0

    def position_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one position in all layers."""
        return 2 * self.layers * self.heads * self.head_size * dtype.itemsize


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """The caches of a decoder, for each row."""

    self_kv: KVSpec
    dtype: torch.dtype
    device: torch.device
    #: Pools of fixed width for rows whose segment has a `carry`: the keys and values projected from the carry.
    extra: tuple[KVSpec, ...] = ()
    #: Maximum bytes of a segment's `carry`.
    carry_bytes: int = 0
    #: Tokens of a block, if keys and values are kept in blocks.
    block_tokens: int = BLOCK_TOKENS


class PromptSegment(Protocol):
    """Consecutive tokens of a prompt, with the features of the pictures among them."""

    @property
    def ids(self) -> Sequence[int]:
        """Token ids."""

    @property
    def carry(self) -> Tensor | None:
        """A tensor of any shape that later tokens need in addition to this segment's keys and values.

        None: they need no more, and the row has no content in the extra pools.
        """

    def split(self, length: int) -> tuple[Self, Self]:
        """Split into the first `length` tokens and the rest."""


class Prefix(Protocol):
    """The prefilled beginning of a prompt, as a K/V cache keeps it."""

    @property
    def length(self) -> int:
        """Number of tokens."""

    @property
    def carry(self) -> Tensor | None:
        """See PromptSegment."""

    @property
    def nbytes(self) -> int:
        """Bytes of the keys, values and carry."""

    @property
    def blocks(self) -> Sequence[int]:
        """Its blocks; empty if its keys and values are not in blocks."""

    def share(self) -> Self:
        """The prefix for another holder, who must release it, too."""

    def release(self) -> None:
        """Give the prefix up. What no holder needs any more is freed."""


@dataclass(frozen=True, slots=True)
class PendingPrompt:
    """The part of a prompt that is not prefilled yet, and the prefix before it."""

    segment: PromptSegment
    prefix: Prefix | None = None

    @property
    def start(self) -> int:
        """Number of tokens of the prefix."""
        return self.prefix.length if self.prefix else 0

    @property
    def end(self) -> int:
        """Number of tokens of the prefix and the segment."""
        return self.start + len(self.segment.ids)

    def release(self) -> None:
        """Give the prefix up: the prompt is in a slot now, or is not prefilled."""
        if self.prefix:
            self.prefix.release()


#: Returns the features of each distinct picture by its key; encodes those that are not cached, with pauses.
Encode = Callable[[Iterable[Picture]], Pauses[Mapping[bytes, "Tensor"]]]


class Decoder(Protocol):
    """A family's text decoder as stateless functions of tensors. The engine owns the caches.

    `self_kv` holds the keys and values of each layer in turn, with room for the new tokens, which the functions write.
    The engine has two layouts (worker/models/self_attention.py reads and writes both):

    - slots: each tensor is (slots, heads, positions, head size);
    - blocks: a block table (rows, width) comes first, then tensors (blocks, block tokens, heads, head size). A row's
      position p is at index p % block tokens of block table[row, p // block tokens]. The table is padded with 0, a
      block that is never written: keys and values of positions that it shows there go to the last block.

    `extra` are the keys and values of the extra pools, each (slots, heads, width, head size); it is empty if no row has
    content there. `step` and `branch` take only tensors and do not branch on their content, so the engine can record
    them as graphs.
    """

    spec: CacheSpec
    #: `step(numbers, *self_kv, *extra)` appends a token to each row and returns the logits (rows, vocabulary) of the
    #: next one. `numbers` (3, rows) holds each row's token, the number of tokens before it, and 0 if the row has no
    #: content in the extra pools. With a block table, another number is the row's slot there. Otherwise row n is in
    #: slot n.
    step: Callable[..., Tensor]
    #: `branch(ids, starts, targets, owner, depth, has_extra, *self_kv, *extra)` runs the tensors of a TokenTree after
    #: each row and returns log-probabilities (rows, targets). `starts` (rows,): tokens before; `has_extra` (rows,).
    branch: Callable[..., Tensor]

    def segment(self, tokens: Tokens, features: Mapping[bytes, Tensor], carry: Tensor | None) -> PromptSegment:
        """Combine tokens with the features of their pictures, by key, after a segment with this carry."""

    def prefill(
        self,
        segments: Sequence[Any],
        starts: Sequence[int],
        slots: Sequence[int],
        self_kv: Sequence[Tensor],
        extra: Sequence[Tensor],
    ) -> Tensor:
        """Write the keys and values of segments into `slots`, after `starts` tokens each.

        Returns the logits (segments, vocabulary) after each segment's last token. If `extra` is empty, `slots` are all
        slots in order, and no segment has a carry. With a block table, segment n is in its row n, and `slots` are those
        of the extra pools.
        """

    def prefill_scored(
        self,
        segments: Sequence[Any],
        starts: Sequence[int],
        slots: Sequence[int],
        tree: TokenTree,
        firsts: Sequence[Sequence[int]],
        self_kv: Sequence[Tensor],
        extra: Sequence[Tensor],
    ) -> Tensor:
        """Prefill segments into the first slots, and score sequences after them. `slots`: those of the extra pools.

        Returns log-probabilities (rows, firsts and targets): of `firsts` after each segment, then of the tree's
        targets. The tree's ids begin with the ids of the segments.
        """
