"""Stop strings are found at the step at which the whole text holds them first, though only its end is decoded."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.model.token_texts import TOKENIZERS, Words, counted, decoder_of, fast, of_bytes, of_texts, stops_of
from worker.engine.stop_strings import Decode, StopStrings, has_stop


def first_step(ids: Sequence[int], is_found: Callable[[Sequence[int]], bool]) -> int | None:
    return next((n for n in range(1, len(ids) + 1) if is_found(ids[:n])), None)


def assert_equal_to_the_whole(rng: random.Random, ids: Sequence[int], decode: Decode) -> None:
    # From the end, where the whole answer is not decoded any more.
    stop = stops_of(rng, decode(ids)[-rng.randint(1, 300) :])
    expected = first_step(ids, lambda new: has_stop(decode(new), stop))
    assert first_step(ids, StopStrings(stop, decode).are_in) == expected, (stop, decode(ids))


@pytest.mark.parametrize("make_ids", [of_texts, of_bytes])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_stop_string_is_found_when_the_whole_text_holds_it(
    name: str, make_ids: Callable[[random.Random, PreTrainedTokenizerFast], list[int]]
) -> None:
    tokenizer = TOKENIZERS[name]()
    for seed in range(200):
        rng = random.Random(seed)
        assert_equal_to_the_whole(rng, make_ids(rng, tokenizer), decoder_of(tokenizer))


def test_a_stop_string_is_found_where_blanks_are_cleaned_up() -> None:
    words = Words()
    for seed in range(300):
        rng = random.Random(seed)
        assert_equal_to_the_whole(rng, rng.choices(words.ids, k=rng.randint(1, 80)), words.decode)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", ["one two three " * 60, "世界你好" * 40, "a🙂b" * 60])
def test_only_the_end_of_a_long_answer_is_decoded(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    decode, asked = counted(decoder_of(tokenizer))
    assert first_step(ids, StopStrings(("\nUser:",), decode).are_in) is None
    assert len(asked) == len(ids) > 100
    assert max(asked) < 100


def test_without_stop_strings_nothing_is_decoded() -> None:
    def decode(new: Sequence[int]) -> str:
        raise AssertionError

    assert not StopStrings((), decode).are_in([1, 2, 3])


def test_a_mark_that_only_a_cut_text_begins_with_is_no_stop_string() -> None:
    backend = Tokenizer(models.WordPiece({"read": 0, "##ing": 1}, unk_token="read"))
    backend.decoder = decoders.WordPiece()
    decode = decoder_of(fast(backend))
    ids = [0, *[1] * 50]
    assert decode(ids[1:]).startswith("##")
    assert first_step(ids, StopStrings(("##",), decode).are_in) is None


def test_a_replacement_character_as_a_stop_string_is_found_where_later_bytes_make_it() -> None:
    tokenizer = TOKENIZERS["bundled"]()
    decode = decoder_of(tokenizer)
    x, a, half = tokenizer.convert_tokens_to_ids(["x", "<0x41>", "<0xE4>"])
    # Bytes side by side are characters together or not at all.
    ids = [x, *[a] * 50, half]
    assert decode(ids[:-1]) == "x" + "A" * 50
    assert decode(ids) == "x" + "\N{REPLACEMENT CHARACTER}" * 51
    assert first_step(ids, StopStrings(("x\N{REPLACEMENT CHARACTER}",), decode).are_in) == len(ids)
