"""Which rows a page shows if there are too many: the same ones each time, with failures favoured. Pure."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping

#: Kinds of rows that are told apart; further ones share the places of one kind.
MAX_KINDS = 50


class Sampler:
    """Takes all rows, each with its kind: an error code, or None for rows that have not failed.

    Of each kind it keeps the rows whose numbers have the smallest hashes: a random choice that is the same each time,
    in memory for `limit` rows of each kind at most.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        #: By kind the negated hash and the number of each kept row: the greatest hash is on top.
        self._kept: dict[str | None, list[tuple[int, int]]] = {}
        self._seen: dict[str | None, int] = {}

    def add(self, row: int, kind: str | None) -> None:
        if kind not in self._kept and len(self._kept) >= MAX_KINDS:
            kind = next(known for known in self._kept if known is not None)
        kept = self._kept.setdefault(kind, [])
        self._seen[kind] = self._seen.get(kind, 0) + 1
        place = -_hash(row), row
        if len(kept) < self._limit:
            heapq.heappush(kept, place)
        elif self._limit:
            heapq.heappushpop(kept, place)

    def chosen(self) -> set[int]:
        """The numbers of the chosen rows, `limit` at most.

        Failed ones get up to half of the places, or more if the others leave some, shared fairly among the codes.
        """
        others = self._seen.get(None, 0)
        failures = {kind: seen for kind, seen in self._seen.items() if kind is not None}
        places = min(sum(failures.values()), max(self._limit // 2, self._limit - others))
        shares: dict[str | None, int] = {None: self._limit - places}
        shares.update(fair_shares(failures, places))
        return {row for kind, kept in self._kept.items() for _, row in heapq.nlargest(shares[kind], kept)}


def fair_shares(sizes: Mapping[str, int], places: int) -> dict[str, int]:
    """Places for each name: as many as it has rows, but no more than an equal share of what smaller ones leave."""
    shares = {}
    for done, (name, size) in enumerate(sorted(sizes.items(), key=lambda item: (item[1], item[0]))):
        shares[name] = min(size, places // (len(sizes) - done))
        places -= shares[name]
    return shares


def _hash(row: int) -> int:
    return int.from_bytes(hashlib.blake2b(row.to_bytes(8, "big"), digest_size=8).digest(), "big")
