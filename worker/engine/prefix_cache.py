"""Beginnings that prompts share, read once: few-shot examples, instructions. Found by content, bounded in bytes."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from worker.engine.row import Tokens
from worker.models.idefics1.decoder import Prefix

#: Tokens. Shorter beginnings are read as fast as they are copied.
MIN_TOKENS = 16
#: Heads of past prompts that are remembered, to know one that comes again.
REMEMBERED = 8192


@dataclass(frozen=True, slots=True)
class Head:
    """A prompt's beginning before one of its images: what differs between jobs is mostly the last image."""

    key: bytes
    length: int
    images: int


def heads(tokens: Tokens, image_id: int) -> list[Head]:
    """The beginnings of a prompt that are worth keeping, the longest first."""
    found: list[Head] = []
    content = hashlib.blake2b(digest_size=16)
    start = images = 0
    for place, token in enumerate(tokens.ids):
        if token != image_id:
            continue
        content.update(array("q", tokens.ids[start:place]).tobytes())
        if place >= MIN_TOKENS:
            found.append(Head(content.digest(), place, images))
        content.update(tokens.pictures[images].key)
        images += 1
        start = place
    return found[::-1]


class PrefixCache:
    """Least-recently-used prefixes. Used by the engine's thread only."""

    def __init__(self, max_bytes: int, token_bytes: int, image_bytes: int = 0) -> None:
        """`token_bytes`: the keys and values of one token. `image_bytes`: the features of a prefix's last image."""
        self._max_bytes = max_bytes
        self._token_bytes = token_bytes
        self._image_bytes = image_bytes
        self._bytes = 0
        self._hits = 0
        self._kept: OrderedDict[bytes, Prefix] = OrderedDict()
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def longest(self, row: Sequence[Head]) -> tuple[Head, Prefix] | None:
        """The longest kept beginning of a prompt."""
        for head in row:
            prefix = self._kept.get(head.key)
            if prefix is not None:
                self._kept.move_to_end(head.key)
                self._hits += 1
                return head, prefix
        return None

    def worth_reading(self, batch: Sequence[Sequence[Head]]) -> list[tuple[int, Head]]:
        """Beginnings to read on their own, and a prompt of the batch that has each: the longest that several prompts
        of the batch share, or that came before. All fit side by side. Call once a batch."""
        shared = Counter(head.key for row in batch for head in row)
        found: dict[bytes, tuple[int, Head]] = {}
        room = self._max_bytes
        for index, row in enumerate(batch):
            recurring = (head for head in row if shared[head.key] > 1 or head.key in self._seen)
            head = next((head for head in recurring if self._size(head) <= self._max_bytes), None)
            if head is not None and head.key not in self._kept and head.key not in found and self._size(head) <= room:
                found[head.key] = index, head
                room -= self._size(head)
        for key in shared:
            self._seen[key] = None
            self._seen.move_to_end(key)
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        return list(found.values())

    def _size(self, head: Head) -> int:
        """Bytes that its prefix will take."""
        return head.length * self._token_bytes + (self._image_bytes if head.images else 0)

    def figures(self) -> dict[str, int]:
        """Beginnings that were not read again, those kept, and their bytes."""
        return {"prefix_hits": self._hits, "prefixes": len(self._kept), "prefix_bytes": self._bytes}

    def keep(self, head: Head, prefix: Prefix) -> None:
        self._kept[head.key] = prefix
        self._bytes += prefix.nbytes
        while self._bytes > self._max_bytes:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= dropped.nbytes
