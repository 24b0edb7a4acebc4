"""A row's new tokens, and the conditions that end it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tasks.errors import InvalidRequest
from worker.engine.grammar import GrammarState
from worker.engine.row import FinishReason, Output, Row, TokenScore
from worker.engine.stop_strings import Decode, StopStrings
from worker.engine.token_scores import Confidence
from worker.observability.metrics import TIME_TO_FIRST_TOKEN


class RowProgress:
    """Collects the new tokens of one continued row, and finishes the row at the step that ends it."""

    def __init__(self, row: Row, decode: Decode) -> None:
        self.row = row
        self._stop_strings = StopStrings(row.sampling.stop, decode)
        self._new: list[int] = []
        row.new_tokens = self._new
        #: None for a row without a grammar.
        self.grammar = GrammarState(row.grammar) if row.grammar else None
        self._confidence = Confidence()
        self._scores: list[TokenScore] = []

    @property
    def new(self) -> Sequence[int]:
        """The new tokens so far."""
        return self._new

    @property
    def last(self) -> int:
        """The newest token."""
        return self._new[-1]

    def take(self, score: TokenScore, now: float) -> None:
        """Append the next token. `now`: time.monotonic()."""
        token = score.id
        if not self.row.first_token:
            self.row.first_token = now
            TIME_TO_FIRST_TOKEN.observe(now - self.row.arrived)
        if self.grammar and not self._keeps_to(self.grammar, token):
            return
        self._confidence.add(score.logprob)
        if token in self.row.sampling.eos_ids:
            self.row.finish(self.output("stop"))
            return
        self._new.append(token)
        if self.row.sampling.logprobs is not None:
            self._scores.append(score)
        reason = self.row.abort_reason(now) or self._limit()
        if reason:
            self.row.finish(self.output(reason))

    def output(self, reason: FinishReason) -> Output:
        """The row's output if it ends now."""
        return Output(tuple(self._new), reason, confidence=self._confidence.value, scores=tuple(self._scores))

    def _keeps_to(self, grammar: GrammarState, token: int) -> bool:
        """Whether the row goes on with a token in its grammar. Otherwise it ends here."""
        is_end = token in self.row.sampling.eos_ids
        if grammar.may_end if is_end else grammar.take(token):
            return True
        if grammar.has_failed():
            self.row.fail(too_complex())
        else:
            # No token is allowed both by the grammar and by the checkpoint's rules.
            self.row.finish(self.output("length"))
        return False

    def _limit(self) -> FinishReason | None:
        if self._stop_strings.are_in(self._new):
            return "stop_sequence"
        if self.grammar and self.grammar.is_complete:
            return "stop"
        return "length" if len(self._new) >= self.row.sampling.max_new_tokens else None


def too_complex() -> InvalidRequest:
    """The error of a row whose grammar needs too much at a step."""
    return InvalidRequest("response_format: it needs too much computing: make it simpler.", detail="response_format")


def grammars_going_on(rows: Iterable[RowProgress]) -> list[GrammarState]:
    """The states of those rows with grammars that are not done."""
    return [row.grammar for row in rows if row.grammar and not row.row.is_done]
