"""Prefill of prompts: shared prefixes once, long prompts in chunks."""

from __future__ import annotations

from collections.abc import Sequence

from worker.engine.blocks import OutOfBlocks
from worker.engine.decoder import SlotDecoder
from worker.engine.interfaces import Encode, PendingPrompt, Prefix
from worker.engine.pauses import Pauses
from worker.engine.prefix_cache import PrefixCache, PrefixKey, prefix_keys
from worker.engine.row import Tokens
from worker.observability.metrics import PREFIX_CACHE

#: Maximum tokens of one prompt in one prefill. A longer prompt is prefilled in chunks, with a decode step between them.
PREFILL_CHUNK_TOKENS = 512


class PromptPrefiller:
    """Makes pending prompts: finds and prefills their prefixes, and prefills chunks of long prompts."""

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

    def cached_length(self, tokens: Tokens) -> int:
        """Number of tokens of a prompt's longest cached prefix."""
        return self._prefixes.longest_length(prefix_keys(tokens))

    def pending(self, prompts: Sequence[Tokens], *, are_new: bool = True) -> Pauses[list[PendingPrompt]]:
        """Each prompt after its longest cached prefix: it must be prefilled or released.

        Prefills and caches recurring prefixes first, unless the prompts were here before (`are_new`).
        """
        keys = [prefix_keys(tokens) for tokens in prompts]
        for index, key in self._prefixes.worth_keeping(keys) if are_new else ():
            prefix = yield from self._prefix(prompts[index], key, keys[index])
            if prefix:
                self._prefixes.keep(key, prefix)
            yield
        known = [self._prefixes.longest(prompt_keys) for prompt_keys in keys]
        if are_new:
            PREFIX_CACHE.queries.inc(sum(len(tokens.ids) for tokens in prompts))
            PREFIX_CACHE.hits.inc(sum(found[0].length for found in known if found))
        rests = [_rest(tokens, found) for tokens, found in zip(prompts, known, strict=True)]
        # All in one call, so that pictures are encoded in chunks.
        features = yield from self._encode(picture for rest in rests for picture in rest.pictures)
        return [
            self._decoder.pending(rest, _prefix_of(found), features) for rest, found in zip(rests, known, strict=True)
        ]

    def is_long(self, prompt: PendingPrompt) -> bool:
        """Whether a prompt must be prefilled in chunks."""
        return len(prompt.segment.ids) > self._chunk_tokens

    def prefill_chunks(self, prompts: Sequence[PendingPrompt]) -> list[PendingPrompt]:
        """Prefill the first chunk of each long prompt, all together. Returns the rests."""
        parts = [prompt.segment.split(self._chunk_tokens) for prompt in prompts]
        chunks = [PendingPrompt(chunk, prompt.prefix) for (chunk, _), prompt in zip(parts, prompts, strict=True)]
        prefixes = self._decoder.prefill_prefixes(chunks)
        return [PendingPrompt(rest, prefix) for (_, rest), prefix in zip(parts, prefixes, strict=True)]

    def chunk_end(self, prompt: PendingPrompt) -> int:
        """Number of tokens of a long prompt when its next chunk is prefilled."""
        return prompt.start + self._chunk_tokens

    def _prefix(self, tokens: Tokens, key: PrefixKey, keys: Sequence[PrefixKey]) -> Pauses[Prefix | None]:
        """Prefill the prefix that ends at `key`, one of the prompt's `keys`. Returns None if blocks are short."""
        # After a shorter cached prefix only the rest is prefilled, as for cached examples and one more.
        shorter = self._prefixes.longest([each for each in keys if each.length < key.length])
        rest = _rest(tokens.until(key.length), shorter)
        features = yield from self._encode(rest.pictures)
        prompt = self._decoder.pending(rest, _prefix_of(shorter), features)
        try:
            while self.is_long(prompt):
                (prompt,) = self.prefill_chunks([prompt])
                yield
            return self._decoder.prefill_prefixes([prompt])[0]
        except OutOfBlocks:
            prompt.release()
            return None


Known = tuple[PrefixKey, Prefix] | None


def _rest(tokens: Tokens, known: Known) -> Tokens:
    """A prompt without its cached prefix."""
    return tokens.behind(known[0].length) if known else tokens


def _prefix_of(known: Known) -> Prefix | None:
    return known[1] if known else None
