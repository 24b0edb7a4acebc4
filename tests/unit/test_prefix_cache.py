"""Which prefixes are kept, decided without prefilling any."""

from __future__ import annotations

from dataclasses import replace

import torch

from worker.engine.prefix_cache import MIN_TOKENS, PrefixCache, PrefixKey, prefix_keys
from worker.engine.row import ImageSpan, Picture, Tokens
from worker.engine.slot_cache import CopiedPrefix

TOKEN_BYTES = 8


def key(name: str, length: int = 20) -> PrefixKey:
    return PrefixKey(name.encode(), length, 1)


def prefix(length: int = 20) -> CopiedPrefix:
    return CopiedPrefix((torch.zeros(1, length, 1), torch.zeros(1, length, 1)), None)


def cache(tokens: int) -> PrefixCache:
    return PrefixCache(tokens * TOKEN_BYTES, TOKEN_BYTES)


def keep(kept: PrefixCache, *batch: list[PrefixKey]) -> list[str]:
    """Keep the prefixes that a batch calls for: their names."""
    found = kept.worth_keeping(batch)
    for _, one in found:
        kept.keep(one, prefix(one.length))
    return [one.key.decode() for _, one in found]


def test_a_prefix_is_kept_once_it_is_shared_or_comes_again() -> None:
    kept = cache(1_000)
    assert keep(kept, [key("a")]) == []
    assert keep(kept, [key("a")]) == ["a"]
    assert keep(kept, [key("a")]) == []
    assert keep(kept, [key("b")], [key("b")]) == ["b"]


def test_a_prompt_of_several_rows_is_kept_at_once_but_for_its_last_token() -> None:
    repeated = replace(tokens("x" * 100, (20, 20)), is_repeated=True)
    kept, keys = cache(1_000), prefix_keys(repeated)
    assert [(found.length, found.images) for found in keys] == [(99, 1), (40, 1), (20, 0)]
    assert kept.worth_keeping([keys]) == [(0, keys[0])]
    # Within a picture no prefix can end.
    assert prefix_keys(replace(tokens("x" * 40, (20, 20)), is_repeated=True)) == prefix_keys(tokens("x" * 40, (20, 20)))


def test_the_longest_that_fits_is_kept() -> None:
    kept = cache(50)
    row = [key("long", 60), key("short", 40)]
    assert keep(kept, row, row) == ["short"]
    found = kept.longest(row)
    assert found is not None
    assert found[0].key == b"short"


def test_prefixes_of_one_batch_stand_side_by_side() -> None:
    kept = cache(50)
    batch = [[key(name)] for name in "abcabc"]
    assert keep(kept, *batch) == ["a", "b"]
    assert all(kept.longest([key(name)]) for name in "ab")


def test_the_least_recently_used_makes_room() -> None:
    kept = cache(40)
    keep(kept, *[[key(name)] for name in "abab"])
    kept.longest([key("a")])
    keep(kept, [key("c")], [key("c")])
    assert [bool(kept.longest([key(name)])) for name in "abc"] == [True, False, True]
    assert kept.metrics() == {"prefix_hits": 3, "prefixes": 2, "prefix_bytes": 40 * TOKEN_BYTES}


def test_no_prefix_is_prefilled_on_its_own_if_none_may_be_kept() -> None:
    kept = cache(0)
    assert keep(kept, [key("a")], [key("a")]) == []
    assert kept.metrics()["prefixes"] == 0


def test_tensors_carried_by_a_prefix_count() -> None:
    kept = PrefixCache(20 * TOKEN_BYTES + 4_000, TOKEN_BYTES, carry_bytes=4_000)
    large = CopiedPrefix((torch.zeros(1, 20, 1), torch.zeros(1, 20, 1)), torch.zeros(10, 100))
    assert large.nbytes == 20 * TOKEN_BYTES + 4_000
    # One fits, and two do not: the second is not read, only to be dropped.
    assert [one.key for _, one in kept.worth_keeping([[key("a")], [key("a")], [key("b")], [key("b")]])] == [b"a"]
    kept.keep(key("a"), large)
    assert kept.metrics()["prefix_bytes"] == large.nbytes


def tokens(text: str, *spans: tuple[int, int], names: str = "abc") -> Tokens:
    """A prompt whose tokens are letters, with pictures at (start, length)."""
    pictures = tuple(Picture(name.encode(), None) for name, _ in zip(names, spans, strict=False))
    found = (ImageSpan(number, start, length) for number, (start, length) in enumerate(spans))
    return Tokens(tuple(map(ord, text)), pictures, tuple(found))


def cuts(prompt: Tokens) -> list[tuple[int, int]]:
    return [(found.length, found.images) for found in prefix_keys(prompt)]


def test_a_prefix_ends_before_each_picture_and_behind_one_of_many_tokens() -> None:
    assert cuts(tokens("x" * 100, (20, 1), (40, 1))) == [(40, 1), (20, 0)]
    assert cuts(tokens("x" * 100, (20, 1), (40, MIN_TOKENS))) == [(40 + MIN_TOKENS, 2), (40, 1), (20, 0)]


def test_a_prefix_leaves_at_least_one_token() -> None:
    assert cuts(tokens("x" * 60, (20, 40))) == [(20, 0)]
    assert cuts(tokens("x" * 61, (20, 40))) == [(60, 1), (20, 0)]


def test_a_short_prefix_is_not_worth_keeping() -> None:
    assert cuts(tokens("x" * 100, (MIN_TOKENS - 1, 1), (MIN_TOKENS, 1))) == [(MIN_TOKENS, 1)]


def test_keys_differ_by_tokens_and_pictures_before_them() -> None:
    first = prefix_keys(tokens("x" * 100, (20, 20), (60, 1)))
    assert prefix_keys(tokens("x" * 99 + "y", (20, 20), (60, 1))) == first
    other_text = prefix_keys(tokens("y" + "x" * 99, (20, 20), (60, 1)))
    assert not {found.key for found in first} & {found.key for found in other_text}
    # Without the last picture, which no prefix shows, and with another first one.
    other_picture = prefix_keys(tokens("x" * 100, (20, 20), (60, 1), names="zb"))
    assert [one.key == other.key for one, other in zip(first, other_picture, strict=True)] == [False, False, True]


def test_a_prompt_is_split_between_pictures() -> None:
    prompt = tokens("abcdefgh", (1, 2), (4, 1))
    assert prompt.until(4) == tokens("abcd", (1, 2))
    assert prompt.behind(4) == Tokens(tuple(map(ord, "efgh")), prompt.pictures[1:], (ImageSpan(0, 0, 1),))
