"""The pieces of a growing answer join to its text, with every tokenizer and on every family's path."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from tasks.response_format import RegexFormat
from tests.model.conftest import Served
from tests.model.jobs import mixed_jobs, row_of
from tests.model.token_texts import TOKENIZERS, Words, counted, decoder_of, of_bytes, of_texts, stops_of
from worker.engine.grammar import Grammar
from worker.engine.interfaces import Runner
from worker.engine.row import Row, Sampling
from worker.engine.stop_strings import REPLACEMENT, Decode, has_stop
from worker.jobs.grammar_text import grammar_text
from worker.jobs.live_text import LiveText
from worker.jobs.result_builder import until_stop
from worker.jobs.row_builder import others


def given(rng: random.Random, ids: Sequence[int], decode: Decode) -> tuple[LiveText, str]:
    """What was given of an answer while it grew, some tokens at a time, and its text. It ends with a stop string."""
    stop = stops_of(rng, decode(ids)[-rng.randint(1, 300) :]) if rng.random() < 0.5 else ()
    end = next((n for n in range(1, len(ids)) if has_stop(decode(ids[:n]), stop)), len(ids))
    live, seen = LiveText(decode, stop), 0
    while seen < end:
        seen = min(end, seen + rng.randint(1, 4))
        live.piece(ids[:seen])
    return live, until_stop(decode(ids[:end]), stop)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_pieces_join_to_the_text_with_characters_and_stop_strings_held_back(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    for seed in range(100):
        rng = random.Random(seed)
        live, text = given(rng, of_texts(rng, tokenizer), decoder_of(tokenizer))
        assert live.rest(text) is not None, (seed, live.given, text)
        assert REPLACEMENT not in live.given


def test_the_pieces_join_where_blanks_are_cleaned_up() -> None:
    words = Words()
    for seed in range(100):
        rng = random.Random(seed)
        live, text = given(rng, rng.choices(words.ids, k=rng.randint(1, 80)), words.decode)
        assert live.rest(text) is not None, (seed, live.given, text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_that_are_no_text_are_noticed_or_held_back(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    for seed in range(100):
        rng = random.Random(seed)
        live, text = given(rng, of_bytes(rng, tokenizer), decoder_of(tokenizer))
        rest = live.rest(text)
        assert rest is None or live.given + rest == text


@pytest.mark.parametrize("text", ["one two three " * 60, "世界你好" * 40, "a🙂b" * 60])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_only_the_end_of_a_long_answer_is_decoded(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    decode, asked = counted(decoder_of(tokenizer))
    live = LiveText(decode, ("\nUser:",))
    for end in range(1, len(ids) + 1):
        live.piece(ids[:end])
    assert live.rest(decoder_of(tokenizer)(ids)) is not None
    assert max(asked) < 100 < len(ids)


def _watched(runner: Runner, rows: Sequence[Row], decode: Callable[[Sequence[int]], str]) -> list[LiveText]:
    """What is given of rows while they run."""
    texts = [LiveText(decode) for _ in rows]

    def look() -> None:
        for row, text in zip(rows, texts, strict=True):
            text.piece(tuple(row.new_tokens))

    runner.run(rows, look, lambda running: [])
    return texts


def _assert_texts_grow(served: Served, runner: Runner) -> None:
    decode = served.model.codec.decode
    jobs = [job.model_copy(update={"max_new_tokens": 8}) for job in mixed_jobs(2, list(served.images))]
    rows = [row_of(served.model, job, served.parts(job)) for job in jobs]
    for row, text in zip(rows, _watched(runner, rows, decode), strict=True):
        output = row.output.result(0)
        assert tuple(row.new_tokens) == output.ids
        whole = decode(output.ids)
        if REPLACEMENT not in whole:
            # Random weights write bytes that are no text.
            assert text.rest(whole) is not None
            assert text.given or not any(char.isalnum() for char in whole)


def test_every_family_gives_its_text_while_it_grows(served: Served) -> None:
    _assert_texts_grow(served, served.model)


def test_stock_generate_gives_its_text_while_it_grows(demo: Served) -> None:
    _assert_texts_grow(demo, demo.stock)


@pytest.mark.parametrize("path", ["model", "stock"])
def test_samples_in_a_form_give_the_text_that_their_grammar_has(demo: Served, path: str) -> None:
    tokenizer = demo.model.codec.grammar_tokens().tokenizer()  # type: ignore[union-attr]
    form = grammar_text(RegexFormat(type="regex", regex=r'( ?[a-z\n "世é]{1,6}){30,60}'), with_blank=True)
    grammar = Grammar(tokenizer, form, drops_blank=True)
    (job,) = mixed_jobs(1, list(demo.images))
    sampling = Sampling(80, temperature=3.0, seed=4, answers=4)
    first = Row(row_of(demo.model, job, demo.parts(job)).tokens, sampling, grammar=grammar)
    rows = [first, *others(first)]
    texts = _watched(getattr(demo, path), rows, grammar.text)
    for row, text in zip(rows, texts, strict=True):
        whole = grammar.text(row.output.result(0).ids)
        assert text.given
        assert text.rest(whole) is not None
    assert len({text.given for text in texts}) > 1


def test_a_search_with_beams_gives_its_text_at_the_end_alone(demo: Served) -> None:
    (job,) = (job.model_copy(update={"num_beams": 2}) for job in mixed_jobs(1, list(demo.images)))
    row = row_of(demo.model, job, demo.parts(job))
    (text,) = _watched(demo.model, [row], demo.model.codec.decode)
    assert row.output.result(0).ids
    assert text.given == ""
