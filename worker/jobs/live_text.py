"""The text of an answer while it grows: the part that no later token changes. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from worker.engine.stop_strings import REPLACEMENT, Decode

#: A window of tokens that is decoded again at each call: when it has more than MAX_TOKENS, and its whole text has been
#: given, only its last CONTEXT_TOKENS stay, as the context in which the next ones are decoded.
MAX_TOKENS, CONTEXT_TOKENS = 32, 8


class LiveText:
    """Gives the text of an answer in pieces, which join to the final text.

    Held back until more is known: what may become a stop string, and all behind the last letter or digit, such as the
    first bytes of a character and a blank that a tokenizer may remove.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = stop
        self._given: list[str] = []
        #: The window's first token, and the part of its text that has been given.
        self._start = 0
        self._shown = ""
        self._count = 0

    @property
    def given(self) -> str:
        """The pieces so far, joined."""
        return "".join(self._given)

    def piece(self, ids: Sequence[int]) -> str:
        """The text that is decided since the last call; may be empty. `ids`: all new tokens so far."""
        if len(ids) == self._count:
            return ""
        self._count = len(ids)
        text = self._decode(ids[self._start :])
        if not text.startswith(self._shown):
            # Bytes that were a character alone are none together with others. `rest` finds that the text differs.
            return ""
        end = decided(text, self._stop)
        piece = text[len(self._shown) : end]
        if piece:
            self._given.append(piece)
            self._shown = text[:end]
        if len(self._shown) == len(text) and len(ids) - self._start > MAX_TOKENS:
            self._slide(ids, text)
        return piece

    def rest(self, text: str) -> str | None:
        """What the pieces lack of the final text; None if they are not its beginning."""
        given = self.given
        return text[len(given) :] if text.startswith(given) else None

    def _slide(self, ids: Sequence[int], text: str) -> None:
        # A character has four bytes at most, each of which may be a token: one of these begins with a whole one.
        for count in range(CONTEXT_TOKENS, CONTEXT_TOKENS + 4):
            context = self._decode(ids[-count:])
            if context and text.endswith(context):
                self._start, self._shown = len(ids) - count, context
                return


def decided(text: str, stop: Sequence[str] = ()) -> int:
    """Number of characters of a growing text that no later token changes."""
    # Bytes at the end that are no character yet may become any.
    text = text.rstrip(REPLACEMENT)
    end = min((text.find(word) for word in stop if word in text), default=len(text))
    end = min((end, *(len(text) - _overlap(text, word) for word in stop)))
    while end and not text[end - 1].isalnum():
        end -= 1
    return end


def _overlap(text: str, word: str) -> int:
    """Number of characters at a text's end that a stop string may begin with."""
    return next((length for length in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:length])), 0)
