"""Grammars that answers keep to, compiled by llguidance, and the place of a row in its grammar.

This module does not import torch: the process that tries grammars out (`worker/jobs/grammar_check.py`) stays small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

#: Bounds of time and memory, in llguidance's units. A first mask takes a second at most, a later one 10 ms; the states
#: of a grammar's lexer, which all its rows share, take 2 kB each.
LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
#: What llguidance says where a grammar does not go on: with a token, or at all.
NOT_ALLOWED, NO_TOKEN_ALLOWED = "doesn't satisfy the grammar", "NoExtension"
#: Tokens after which most grammars that exceed LIMITS have done so.
PROBE_TOKENS = 24


class GrammarRefused(Exception):
    """The grammar is wrong, uses what llguidance does not support, or is too large. The message says which."""


@dataclass(frozen=True, slots=True)
class GrammarTokens:
    """A model's tokens, as llguidance needs them."""

    #: The tokenizer in the JSON of `tokenizers`.
    definition: str
    #: Number of tokens with a logit.
    count: int
    #: Those that end an answer.
    eos_ids: tuple[int, ...]

    def tokenizer(self) -> LLTokenizer:
        """Takes up to a second."""
        return LLTokenizer(self.definition, n_vocab=self.count, eos_token=list(self.eos_ids))


class Grammar:
    """A compiled grammar. Thread-safe."""

    def __init__(self, tokenizer: LLTokenizer, definition: str, *, drops_blank: bool) -> None:
        """`definition`: in llguidance's notation. `drops_blank`: whether a blank before the text is no part of it.

        Compiling takes up to some seconds, during which other threads run. Raises GrammarRefused.
        """
        #: Tells grammars apart; answers in one grammar have another digest than those in another.
        self.definition = definition
        self._tokenizer = tokenizer
        self._drops_blank = drops_blank
        self._start = LLMatcher(tokenizer, definition, log_level=0, limits=LIMITS)
        #: The mask of the first token: a bit for each token, the lowest bit first, in words of four bytes.
        self.first_mask: bytes = self._start.compute_bitmask()[: (tokenizer.vocab_size + 31) // 32 * 4]
        if self._start.is_error():
            raise GrammarRefused(_fault(self._start))
        #: Whether a row has met a limit: the grammar must be compiled again, as its lexer's states may be too many.
        self.is_exhausted = False

    def begins_with_blank(self) -> bool:
        """Whether a text of the grammar may begin with a blank."""
        blank = self._tokenizer.greedy_tokenize(" ")
        return self.matcher().try_consume_tokens(blank) == len(blank)

    def probe(self) -> None:
        """Go some tokens into the grammar at random. Raises GrammarRefused if that exceeds LIMITS."""
        random, matcher = Random(0), self.matcher()  # noqa: S311 - no secret
        for _ in range(PROBE_TOKENS):
            allowed = int.from_bytes(matcher.compute_bitmask(), "little")
            if matcher.is_stopped() or not allowed:
                break
            skipped = random.randrange(allowed.bit_length())
            matcher.consume_token(skipped + _lowest_bit(allowed >> skipped))
        if matcher.is_error():
            raise GrammarRefused(_fault(matcher))

    def matcher(self) -> LLMatcher:
        """A matcher at the grammar's start. Takes 10 microseconds: it shares what others have found out."""
        return self._start.deep_copy()

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer's tokens, exactly as the grammar has it; without the bytes of a character that the
        answer's end has cut."""
        text: str = self._tokenizer.decode_bytes(list(ids)).decode(errors="ignore")
        return text.removeprefix(" ") if self._drops_blank else text


def _lowest_bit(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def _fault(matcher: LLMatcher) -> str:
    """Why a matcher has failed."""
    fault = str(matcher.get_error()).removesuffix("<non-verbose/>").strip()
    return "no text fits it" if fault.startswith(NO_TOKEN_ALLOWED) else fault


class GrammarState:
    """The place of one row in its grammar."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self.matcher = grammar.matcher()
        #: The masks of one step, and the place of the next one among them: see TokenMasks. None: it is the first one.
        self.next_mask: Any = None

    @property
    def first_mask(self) -> bytes:
        return self._grammar.first_mask

    @property
    def is_complete(self) -> bool:
        """Whether the text fits the grammar and no other token may follow."""
        return bool(self.matcher.is_stopped())

    @property
    def may_end(self) -> bool:
        """Whether the text fits the grammar."""
        return bool(self.matcher.is_accepting())

    def take(self, token: int) -> bool:
        """Go on by a token. False if the grammar does not have it here, or LIMITS are exceeded."""
        return bool(self.matcher.consume_token(token))

    def has_failed(self) -> bool:
        """Whether LIMITS are exceeded, so that nothing is known of the next token."""
        fault = str(self.matcher.get_error()) if self.matcher.is_error() else ""
        if not fault or NOT_ALLOWED in fault or fault.startswith(NO_TOKEN_ALLOWED):
            return False
        self._grammar.is_exhausted = True
        return True
