"""A row's new tokens, and the conditions that end it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from worker.engine.row import FinishReason, Output, Row

Decode = Callable[[Sequence[int]], str]


class RowProgress:
    """Collects the new tokens of one continued row, and finishes the row at the step that ends it."""

    def __init__(self, row: Row, decode: Decode) -> None:
        self.row = row
        self._decode = decode
        self._new: list[int] = []

    @property
    def new(self) -> Sequence[int]:
        """The new tokens so far."""
        return self._new

    @property
    def last(self) -> int:
        """The newest token."""
        return self._new[-1]

    def take(self, token: int, now: float) -> None:
        """Append the next token. `now`: time.monotonic()."""
        if token in self.row.sampling.eos_ids:
            self.row.finish(Output(tuple(self._new), "stop"))
            return
        self._new.append(token)
        reason = self.row.abort_reason(now) or self._limit()
        if reason:
            self.row.finish(Output(tuple(self._new), reason))

    def _limit(self) -> FinishReason | None:
        sampling = self.row.sampling
        if sampling.stop and has_stop(self._decode(self._new), sampling.stop):
            return "stop_sequence"
        return "length" if len(self._new) >= sampling.max_new_tokens else None


def has_stop(text: str, stop: Sequence[str]) -> bool:
    """Whether a text contains a stop string."""
    return any(word in text for word in stop)
