"""A cache of prefixes that prompts share, such as few-shot examples. Found by content, bounded in bytes."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from worker.engine.interfaces import Prefix
from worker.engine.row import Tokens
from worker.observability.metrics import PREFIX_CACHE_BYTES

#: Minimum tokens of a prefix, or of a picture that ends one: prefilling fewer is as fast as copying them.
MIN_TOKENS = 16
#: Maximum keys of past prompts that are kept, to recognise a prefix that recurs.
MAX_RECENT_KEYS = 8192


@dataclass(frozen=True, slots=True)
class PrefixKey:
    """A position in a prompt where a prefix may end, with a hash of the content before it.

    Such positions are next to pictures: jobs differ mostly in the last picture, or in the question about a picture.
    """

    key: bytes
    #: Number of tokens before the position.
    length: int
    #: Number of pictures before the position.
    images: int
    #: Whether the prefix is known to recur.
    recurs: bool = False


def prefix_keys(tokens: Tokens) -> list[PrefixKey]:
    """The positions in a prompt where a prefix is worth keeping, the longest first: before each picture, and after each
    picture of at least MIN_TOKENS tokens. In a prompt that several rows have also before its last token."""
    found: list[PrefixKey] = []
    content = hashlib.blake2b(tokens.salt, digest_size=16)
    start = 0

    def cut(place: int, images: int, *, is_worth: bool, recurs: bool = False) -> None:
        nonlocal start
        content.update(array("q", tokens.ids[start:place]).tobytes())
        start = place
        # At least one token must be left after a prefix, since prefill computes the logits of the last token.
        if is_worth and MIN_TOKENS <= place < len(tokens.ids):
            found.append(PrefixKey(content.digest(), place, images, recurs))

    for span in tokens.spans:
        cut(span.start, span.image, is_worth=True)
        content.update(tokens.pictures[span.image].key)
        cut(span.end, span.image + 1, is_worth=span.length >= MIN_TOKENS)
    if tokens.is_repeated and start < len(tokens.ids):
        cut(len(tokens.ids) - 1, len(tokens.pictures), is_worth=True, recurs=True)
    return found[::-1]


class PrefixCache:
    """Least-recently-used prefixes. Used by the engine's thread only."""

    def __init__(self, max_bytes: int, token_bytes: int, carry_bytes: int = 0) -> None:
        """`token_bytes`: of one token's keys and values. `carry_bytes`: of the carry of a prefix with pictures (see
        interfaces.PromptSegment)."""
        self._max_bytes = max_bytes
        self._token_bytes = token_bytes
        self._carry_bytes = carry_bytes
        self._bytes = 0
        self._hits = 0
        self._kept: OrderedDict[bytes, Prefix] = OrderedDict()
        self._recent_keys: OrderedDict[bytes, None] = OrderedDict()

    def longest(self, keys: Sequence[PrefixKey]) -> tuple[PrefixKey, Prefix] | None:
        """The longest cached prefix of a prompt, which the caller must release. `keys`: its `prefix_keys`."""
        for key in keys:
            prefix = self._kept.get(key.key)
            if prefix is not None:
                self._kept.move_to_end(key.key)
                self._hits += 1
                return key, prefix.share()
        return None

    def longest_length(self, keys: Sequence[PrefixKey]) -> int:
        """Number of tokens of the prefix that `longest` would return; 0 for none."""
        return next((key.length for key in keys if key.key in self._kept), 0)

    def worth_keeping(self, batch: Sequence[Sequence[PrefixKey]]) -> list[tuple[int, PrefixKey]]:
        """Choose prefixes to prefill and keep, each with the index of a prompt of the batch that begins with it.

        For each prompt: the longest prefix that occurs in another prompt of the batch or in an earlier batch, unless it
        is cached already. All of them fit in the cache together. Call this once for each batch.
        """
        shared = Counter(key.key for keys in batch for key in keys)
        found: dict[bytes, tuple[int, PrefixKey]] = {}
        room = self._max_bytes
        for index, keys in enumerate(batch):
            recurring = (key for key in keys if key.recurs or shared[key.key] > 1 or key.key in self._recent_keys)
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
        """Bytes of the prefix that ends at a key."""
        return key.length * self._token_bytes + (self._carry_bytes if key.images else 0)

    def metrics(self) -> dict[str, int]:
        """Cache hits, number of cached prefixes, and their bytes."""
        return {"prefix_hits": self._hits, "prefixes": len(self._kept), "prefix_bytes": self._bytes}

    def keep(self, key: PrefixKey, prefix: Prefix) -> None:
        """Add a prefix, which the cache releases later, and evict the least recently used ones beyond `max_bytes`."""
        self._kept[key.key] = prefix
        self._bytes += prefix.nbytes
        while self._bytes > self._max_bytes:
            self.evict()
        PREFIX_CACHE_BYTES.set(self._bytes)

    def evict(self) -> bool:
        """Evict the least recently used prefix. Returns whether there was one."""
        if not self._kept:
            return False
        _, dropped = self._kept.popitem(last=False)
        self._bytes -= dropped.nbytes
        dropped.release()
        PREFIX_CACHE_BYTES.set(self._bytes)
        return True

    def blocks(self) -> Iterator[int]:
        """The blocks of all prefixes, each once for each prefix that has it."""
        for prefix in self._kept.values():
            yield from prefix.blocks

    def clear(self) -> None:
        """Evict all prefixes."""
        while self.evict():
            pass
