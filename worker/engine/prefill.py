"""Prefill of prompts: shared prefixes once, long prompts in chunks."""

from __future__ import annotations

from collections.abc import Sequence

from worker.engine.decoder import SlotDecoder
from worker.engine.interfaces import Encode, PendingPrompt, Prefix
from worker.engine.pauses import Pauses
from worker.engine.prefix_cache import PrefixCache, PrefixKey, prefix_keys
from worker.engine.row import Row, Tokens

#: Maximum tokens of one prompt in one prefill. A longer prompt is prefilled in chunks, with a decode step between them.
PREFILL_CHUNK_TOKENS = 512


class PromptPrefiller:
    """Makes pending prompts of rows: finds and prefills their prefixes, and prefills chunks of long prompts."""

    def __init__(
        self, decoder: SlotDecoder, prefixes: PrefixCache, encode: Encode, chunk_tokens: int = PREFILL_CHUNK_TOKENS
    ) -> None:
        """`decoder`: must have no slot in use whenever a method is called or a generator resumed."""
        self._decoder = decoder
        self._prefixes = prefixes
        self._encode = encode
        self._chunk_tokens = chunk_tokens

    def metrics(self) -> dict[str, int]:
        """Counters of the prefix cache."""
        return self._prefixes.metrics()

    def clear(self) -> None:
        """Drop all cached prefixes."""
        self._prefixes.clear()

    def pending(self, rows: Sequence[Row]) -> Pauses[list[tuple[Row, PendingPrompt]]]:
        """Each row's prompt after its longest cached prefix. Prefills and caches recurring prefixes first.

        Each prompt must be prefilled or released.
        """
        keys = [prefix_keys(row.tokens) for row in rows]
        for index, key in self._prefixes.worth_keeping(keys):
            self._prefixes.keep(key, (yield from self._prefix(rows[index].tokens, key, keys[index])))
            yield
        known = [self._prefixes.longest(row_keys) for row_keys in keys]
        rests = [_rest(row.tokens, found) for row, found in zip(rows, known, strict=True)]
        # All in one call, so that pictures are encoded in chunks.
        features = yield from self._encode(picture for rest in rests for picture in rest.pictures)
        return [
            (row, self._decoder.pending(rest, _prefix_of(found), features))
            for row, rest, found in zip(rows, rests, known, strict=True)
        ]

    def is_long(self, prompt: PendingPrompt) -> bool:
        """Whether a prompt must be prefilled in chunks."""
        return len(prompt.segment.ids) > self._chunk_tokens

    def prefill_chunk(self, prompt: PendingPrompt) -> PendingPrompt:
        """Prefill the first chunk of a long prompt. Returns the rest."""
        chunk, rest = prompt.segment.split(self._chunk_tokens)
        return PendingPrompt(rest, self._decoder.prefill_prefix(PendingPrompt(chunk, prompt.prefix)))

    def _prefix(self, tokens: Tokens, key: PrefixKey, keys: Sequence[PrefixKey]) -> Pauses[Prefix]:
        """Prefill the prefix that ends at `key`, one of the prompt's `keys`."""
        # After a shorter cached prefix only the rest is prefilled, as for cached examples and one more.
        shorter = self._prefixes.longest([each for each in keys if each.length < key.length])
        rest = _rest(tokens.until(key.length), shorter)
        features = yield from self._encode(rest.pictures)
        prompt = self._decoder.pending(rest, _prefix_of(shorter), features)
        while self.is_long(prompt):
            prompt = self.prefill_chunk(prompt)
            yield
        return self._decoder.prefill_prefix(prompt)


Known = tuple[PrefixKey, Prefix] | None


def _rest(tokens: Tokens, known: Known) -> Tokens:
    """A prompt without its cached prefix."""
    return tokens.behind(known[0].length) if known else tokens


def _prefix_of(known: Known) -> Prefix | None:
    return known[1] if known else None
