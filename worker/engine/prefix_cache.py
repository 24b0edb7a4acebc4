"""Prefixes that prompts share, prefilled once: few-shot examples, instructions. Found by content, bounded in bytes."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from worker.engine.interfaces import Prefix
from worker.engine.row import Tokens

#: Tokens. What is shorter is prefilled as fast as it is copied: a prefix, or a picture that would end one.
MIN_TOKENS = 16
#: Keys of past prompts that are remembered, to know a prefix that comes again.
MAX_RECENT_KEYS = 8192


@dataclass(frozen=True, slots=True)
class PrefixKey:
    """A place in a prompt where a prefix may end, by the content before it: next to a picture, since what differs
    between jobs is mostly the last picture, or what is asked about one."""

    key: bytes
    #: Tokens before it.
    length: int
    #: Pictures before it.
    images: int


def prefix_keys(tokens: Tokens) -> list[PrefixKey]:
    """The places in a prompt where a prefix is worth keeping, the longest first: before each picture, and behind one of
    many tokens."""
    found: list[PrefixKey] = []
    content = hashlib.blake2b(digest_size=16)
    start = 0

    def cut(place: int, images: int, *, is_worth: bool) -> None:
        nonlocal start
        content.update(array("q", tokens.ids[start:place]).tobytes())
        start = place
        # At least one token is left: its logits are what the prompt is prefilled for.
        if is_worth and MIN_TOKENS <= place < len(tokens.ids):
            found.append(PrefixKey(content.digest(), place, images))

    for span in tokens.spans:
        cut(span.start, span.image, is_worth=True)
        content.update(tokens.pictures[span.image].key)
        cut(span.end, span.image + 1, is_worth=span.length >= MIN_TOKENS)
    return found[::-1]


class PrefixCache:
    """Least-recently-used prefixes. Used by the engine's thread only."""

    def __init__(self, max_bytes: int, token_bytes: int, carry_bytes: int = 0) -> None:
        """`token_bytes`: the keys and values of one token. `carry_bytes`: what a prefix with pictures carries beside
        them (see interfaces.PromptSegment)."""
        self._max_bytes = max_bytes
        self._token_bytes = token_bytes
        self._carry_bytes = carry_bytes
        self._bytes = 0
        self._hits = 0
        self._kept: OrderedDict[bytes, Prefix] = OrderedDict()
        self._recent_keys: OrderedDict[bytes, None] = OrderedDict()

    def longest(self, keys: Sequence[PrefixKey]) -> tuple[PrefixKey, Prefix] | None:
        """The longest kept prefix of a prompt with these keys, which `prefix_keys` made."""
        for key in keys:
            prefix = self._kept.get(key.key)
            if prefix is not None:
                self._kept.move_to_end(key.key)
                self._hits += 1
                return key, prefix
        return None

    def worth_keeping(self, batch: Sequence[Sequence[PrefixKey]]) -> list[tuple[int, PrefixKey]]:
        """Prefixes to prefill on their own, each with the index of a prompt of the batch that begins so.

        For each prompt, the longest that several prompts of the batch share or that came before, if it is not kept. All
        fit in the cache together. To be called once for each batch.
        """
        shared = Counter(key.key for keys in batch for key in keys)
        found: dict[bytes, tuple[int, PrefixKey]] = {}
        room = self._max_bytes
        for index, keys in enumerate(batch):
            recurring = (key for key in keys if shared[key.key] > 1 or key.key in self._recent_keys)
            key = next((key for key in recurring if self._size(key) <= self._max_bytes), None)
            if key is not None and key.key not in self._kept and key.key not in found and self._size(key) <= room:
                found[key.key] = index, key
                room -= self._size(key)
        for content in shared:
            self._recent_keys[content] = None
            self._recent_keys.move_to_end(content)
        while len(self._recent_keys) > MAX_RECENT_KEYS:
            self._recent_keys.popitem(last=False)
        return list(found.values())

    def _size(self, key: PrefixKey) -> int:
        """Bytes that its prefix will take."""
        return key.length * self._token_bytes + (self._carry_bytes if key.images else 0)

    def metrics(self) -> dict[str, int]:
        """Prefixes that were not prefilled again, those kept, and their bytes."""
        return {"prefix_hits": self._hits, "prefixes": len(self._kept), "prefix_bytes": self._bytes}

    def keep(self, key: PrefixKey, prefix: Prefix) -> None:
        """Keep a prefix, and drop the least recently used ones beyond the cache's bytes."""
        self._kept[key.key] = prefix
        self._bytes += prefix.nbytes
        while self._bytes > self._max_bytes:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= dropped.nbytes
