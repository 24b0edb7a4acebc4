"""Finds stop strings in a growing answer by decoding its end only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

#: What a tokenizer writes for bytes that are not a whole character (yet).
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
#: Additional characters of the decoded end. Without the tokens before it, its first token may be written differently
#: (without its blank, or with a mark of a word's continuation), and the newest token may change a blank before it.
MARGIN = 8


def has_stop(text: str, stop: Sequence[str]) -> bool:
    """Whether a text contains a stop string."""
    return any(word in text for word in stop)


class StopStrings:
    """Says after each new token whether the answer contains a stop string: as if the whole answer were decoded.

    A text is cut only behind a letter or digit, where the decoded parts join to the decoded whole: no character's bytes
    and no blank that a tokenizer may remove are divided. A text that has no such place is decoded as a whole.
    """

    def __init__(self, stop: Sequence[str], decode: Decode) -> None:
        self._stop = stop
        self._decode = decode
        #: Characters from `_start` to `_middle`, and from there to the newest token, that suffice.
        self._enough = max(map(len, stop), default=0) + MARGIN
        # A replacement character stands for other bytes later, so it can be anywhere in a part that was cut off.
        self._is_cut = not has_stop("".join(stop), REPLACEMENT)
        #: Two places of `ids` that the answer can be cut at, and the characters between them. The end is decoded from
        #: the first one on. It moves to the second one when enough text follows that.
        self._start = self._middle = self._between = 0

    def are_in(self, ids: Sequence[int]) -> bool:
        """Whether the answer contains one. `ids`: all its tokens, one more than in the call before."""
        if not self._stop:
            return False
        end = self._decode(ids[self._start :])
        # Confirmed by the whole text: bytes that are whole characters in the end may be invalid together with others.
        if has_stop(end, self._stop) and (not self._start or has_stop(self._decode(ids), self._stop)):
            return True
        if self._is_cut and end[-1:].isalnum() and len(end) - self._between >= self._enough:
            self._start, self._middle, self._between = self._middle, len(ids), len(end) - self._between
        return False
