"""What is to be prefilled of rows' prompts: behind prefixes that are shared, and long ones in chunks."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

from worker.engine.decoder import SlotDecoder
from worker.engine.interfaces import Encode, PendingPrompt, Prefix
from worker.engine.prefix_cache import PrefixCache, PrefixKey, prefix_keys
from worker.engine.row import Row, Tokens

#: Tokens of one prompt that are prefilled at once; a longer one is prefilled in chunks, with a step between them.
PREFILL_CHUNK_TOKENS = 512

T = TypeVar("T")
#: Work that pauses wherever the running rows may take a step.
Pauses = Generator[None, None, T]


class PromptPrefiller:
    """Makes pending prompts of rows, on a decoder whose slots hold prefixes for a moment only."""

    def __init__(
        self, decoder: SlotDecoder, prefixes: PrefixCache, encode: Encode, chunk_tokens: int = PREFILL_CHUNK_TOKENS
    ) -> None:
        """`decoder`: none of its slots may be in use where a method of this is called or goes on."""
        self._decoder = decoder
        self._prefixes = prefixes
        self._encode = encode
        self._chunk_tokens = chunk_tokens

    def metrics(self) -> dict[str, int]:
        """See PrefixCache."""
        return self._prefixes.metrics()

    def pending(self, rows: Sequence[Row]) -> Pauses[list[tuple[Row, PendingPrompt]]]:
        """Each row's prompt behind the longest prefix that is kept. Prefixes that pay are prefilled and kept first."""
        keys = [prefix_keys(row.tokens) for row in rows]
        for index, key in self._prefixes.worth_keeping(keys):
            self._prefixes.keep(key, (yield from self._prefix(rows[index].tokens, key, keys[index])))
            yield
        known = [self._prefixes.longest(row_keys) for row_keys in keys]
        rests = [_rest(row.tokens, found) for row, found in zip(rows, known, strict=True)]
        # All at once, so that they are encoded in chunks.
        features = self._encode(picture for rest in rests for picture in rest.pictures)
        return [
            (row, self._decoder.pending(rest, _prefix_of(found), features))
            for row, rest, found in zip(rows, rests, known, strict=True)
        ]

    def is_long(self, prompt: PendingPrompt) -> bool:
        """Whether it is to be prefilled in chunks."""
        return len(prompt.segment.ids) > self._chunk_tokens

    def prefill_chunk(self, prompt: PendingPrompt) -> PendingPrompt:
        """Prefill the first chunk of a long prompt. Returns what is left."""
        chunk, rest = prompt.segment.split(self._chunk_tokens)
        return PendingPrompt(rest, self._decoder.prefill_prefix(PendingPrompt(chunk, prompt.prefix)))

    def _prefix(self, tokens: Tokens, key: PrefixKey, keys: Sequence[PrefixKey]) -> Pauses[Prefix]:
        """The prefix of a prompt that ends at `key`, of the prompt's `keys`."""
        # Examples that were shared before and one more: only what is new is prefilled.
        shorter = self._prefixes.longest([each for each in keys if each.length < key.length])
        rest = _rest(tokens.until(key.length), shorter)
        prompt = self._decoder.pending(rest, _prefix_of(shorter), self._encode(rest.pictures))
        while self.is_long(prompt):
            prompt = self.prefill_chunk(prompt)
            yield
        return self._decoder.prefill_prefix(prompt)


Known = tuple[PrefixKey, Prefix] | None


def _rest(tokens: Tokens, known: Known) -> Tokens:
    """A prompt without the prefix that is kept."""
    return tokens.behind(known[0].length) if known else tokens


def _prefix_of(known: Known) -> Prefix | None:
    return known[1] if known else None
