"""Which beginnings are kept, decided without reading any."""

from __future__ import annotations

import torch

from worker.engine.prefix_cache import Head, PrefixCache
from worker.models.idefics1.decoder import Prefix

TOKEN_BYTES = 8


def head(name: str, length: int = 20) -> Head:
    return Head(name.encode(), length, 1)


def prefix(length: int = 20) -> Prefix:
    layer = torch.zeros(1, length, 1), torch.zeros(1, length, 1)
    return Prefix((layer,), None)


def cache(tokens: int) -> PrefixCache:
    return PrefixCache(tokens * TOKEN_BYTES, TOKEN_BYTES)


def read(kept: PrefixCache, *batch: list[Head]) -> list[str]:
    """Have the beginnings kept that a batch calls for: their names."""
    found = kept.worth_reading(batch)
    for _, one in found:
        kept.keep(one, prefix(one.length))
    return [one.key.decode() for _, one in found]


def test_a_beginning_is_read_once_it_is_shared_or_comes_again() -> None:
    kept = cache(1_000)
    assert read(kept, [head("a")]) == []
    assert read(kept, [head("a")]) == ["a"]
    assert read(kept, [head("a")]) == []
    assert read(kept, [head("b")], [head("b")]) == ["b"]


def test_the_longest_that_fits_is_kept() -> None:
    kept = cache(50)
    row = [head("long", 60), head("short", 40)]
    assert read(kept, row, row) == ["short"]
    found = kept.longest(row)
    assert found is not None
    assert found[0].key == b"short"


def test_those_of_one_batch_stand_side_by_side() -> None:
    kept = cache(50)
    batch = [[head(name)] for name in "abcabc"]
    assert read(kept, *batch) == ["a", "b"]
    assert all(kept.longest([head(name)]) for name in "ab")


def test_the_least_recently_used_makes_room() -> None:
    kept = cache(40)
    read(kept, *[[head(name)] for name in "abab"])
    kept.longest([head("a")])
    read(kept, [head("c")], [head("c")])
    assert [bool(kept.longest([head(name)])) for name in "abc"] == [True, False, True]
    assert kept.figures() == {"prefix_hits": 3, "prefixes": 2, "prefix_bytes": 40 * TOKEN_BYTES}


def test_nothing_is_read_on_its_own_where_nothing_may_be_kept() -> None:
    kept = cache(0)
    assert read(kept, [head("a")], [head("a")]) == []
    assert kept.figures()["prefixes"] == 0


def test_a_prefixs_last_image_counts() -> None:
    kept = PrefixCache(20 * TOKEN_BYTES + 4_000, TOKEN_BYTES, image_bytes=4_000)
    layer = torch.zeros(1, 20, 1), torch.zeros(1, 20, 1)
    large = Prefix((layer,), torch.zeros(10, 100))
    assert large.nbytes == 20 * TOKEN_BYTES + 4_000
    # One fits, and two do not: the second is not read, only to be dropped.
    assert [one.key for _, one in kept.worth_reading([[head("a")], [head("a")], [head("b")], [head("b")]])] == [b"a"]
    kept.keep(head("a"), large)
    assert kept.figures()["prefix_bytes"] == large.nbytes
