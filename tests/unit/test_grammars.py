"""Response formats become grammars: right ones, quickly; wrong and hostile ones are refused, and harm no process."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import InvalidRequest
from tasks.payloads import parse
from tests.support.rows import row
from worker.engine.grammar import Grammar, GrammarRefused, GrammarState, GrammarTokens
from worker.engine.progress import RowProgress
from worker.engine.row import Output, TokenScore
from worker.jobs import grammars as module
from worker.jobs.grammar_check import GrammarChecker
from worker.jobs.grammar_text import grammar_text
from worker.jobs.grammars import Grammars
from worker.models import DEMO

TOKENS = GrammarTokens((DEMO / "tokenizer.json").read_text(), 1403, (2, 1402))
TOKENIZER = TOKENS.tokenizer()
SUITE = json.loads((Path(__file__).parent / "json_schema_suite.json").read_text())["cases"]
#: Keywords that the library does not know, so that no answer could be promised to fit them.
UNSUPPORTED: list[dict[str, Any]] = [
    {"not": {"type": "string"}},
    {"if": {"type": "string"}, "then": {"minLength": 3}},
    {"type": "array", "uniqueItems": True},
    {"type": "array", "contains": {"type": "string"}},
    {"type": "object", "propertyNames": {"maxLength": 3}},
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"oneOf": [{"type": "integer"}, {"minimum": 2}]},
    {"type": "string", "pattern": "(?=a)a"},
]


def form(asked: dict[str, Any]) -> Any:
    payload = {"image": "https://example.com/a.png", "question": "?", "response_format": asked}
    return parse("idefics.answer", payload).response_format  # type: ignore[attr-defined]


def of_schema(schema: dict[str, Any]) -> Any:
    return form({"type": "json_schema", "json_schema": {"schema": schema}})


def takes(grammar: Grammar, text: str) -> bool:
    ids = TOKENIZER.greedy_tokenize(text)
    matcher = grammar.matcher()
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    made = Grammars(lambda: TOKENS)
    yield made
    made.close()


def test_no_value_that_a_schema_excludes_is_in_its_grammar() -> None:
    for case in SUITE:
        grammar = Grammar(TOKENIZER, grammar_text(of_schema(case["schema"]), with_blank=False), drops_blank=False)
        for value in case["invalid"]:
            assert not takes(grammar, json.dumps(value, ensure_ascii=False)), (case["of"], value)
        for value in case["valid"]:
            assert takes(grammar, json.dumps(value, ensure_ascii=False)), (case["of"], value)


@pytest.mark.parametrize("schema", UNSUPPORTED, ids=str)
def test_what_cannot_be_promised_is_refused(grammars: Grammars, schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="response_format: ") as refused:
        grammars.of(of_schema(schema))
    assert refused.value.detail == "response_format"


@pytest.mark.parametrize(
    ("asked", "right", "wrong"),
    [
        ({"type": "regex", "regex": r"a/b|[/]{2}\d"}, ["a/b", "//7"], ["a", "//x"]),
        ({"type": "regex", "regex": "^a\nb$"}, ["a\nb"], ["ab"]),
        ({"type": "choice", "choice": ['say "a"', "back\\slash", "é"]}, ['say "a"', "back\\slash", "é"], ["say", "e"]),
        ({"type": "grammar", "grammar": 'start: "(" start? ")"'}, ["()", "((()))"], ["(", "())"]),
        ({"type": "json_object"}, ["{}", '{"a": [1, null]}'], ["[]", '{"a":1}', '{ "a": 1}']),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)
def test_a_form_takes_its_texts_and_no_others(
    grammars: Grammars, asked: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    grammar = grammars.of(form(asked))
    for text in right:
        assert takes(grammar, text)
        # As models write it after `Answer:`.
        assert takes(grammar, f" {text}")
        ids = tuple(TOKENIZER.greedy_tokenize(f" {text}"))
        assert grammar.text(ids) == text
    assert not any(takes(grammar, text) for text in wrong)


def test_a_blank_that_a_form_may_begin_with_is_part_of_the_text(grammars: Grammars) -> None:
    grammar = grammars.of(form({"type": "regex", "regex": "[a ]{2}"}))
    assert takes(grammar, " a")
    assert not takes(grammar, " aa")
    assert grammar.text(tuple(TOKENIZER.greedy_tokenize(" a"))) == " a"


def test_the_text_of_an_answer_that_is_cut_within_a_character_has_no_part_of_it(grammars: Grammars) -> None:
    grammar = grammars.of(form({"type": "regex", "regex": "[世界]+"}))
    # A token for each byte, as the demo's tokenizer does not know the character.
    *ids, _ = TOKENIZER.greedy_tokenize("世世")
    assert grammar.text(tuple(ids)) == "世"


def test_rows_of_one_grammar_are_at_places_of_their_own(grammars: Grammars) -> None:
    grammar = grammars.of(form({"type": "choice", "choice": ["ab", "b"]}))
    one, other = GrammarState(grammar), GrammarState(grammar)
    for token in TOKENIZER.greedy_tokenize("b"):
        assert other.take(token)
    assert other.is_complete
    assert other.may_end
    assert not one.may_end
    assert not one.take(2)


def nested(levels: int) -> dict[str, Any]:
    """A schema of 2 ** levels alternatives."""
    defs: dict[str, Any] = {
        f"d{n}": {"allOf": [{"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2}] * 2} for n in range(levels)
    }
    return {"$defs": {**defs, f"d{levels}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def properties(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(count)}}


def lines(*texts: str) -> dict[str, Any]:
    return {"type": "grammar", "grammar": "\n".join(texts)}


#: Takes minutes, in a call that cannot be interrupted.
INTERSECTIONS = {"allOf": [{"type": "string", "pattern": f".*{n}.{{30}}x"} for n in range(20)]}
HOSTILE: dict[str, dict[str, Any]] = {
    "nested repeats": {"type": "regex", "regex": "(a{1000}){1000}"},
    "a billion repeats": {"type": "regex", "regex": "a{1000000000}"},
    "repeats of repeats": {"type": "regex", "regex": "(((((((((a{10}){10}){10}){10}){10}){10}){10}){10}){10}"},
    "optional repeats": {"type": "regex", "regex": "(a?){5000}a{5000}"},
    "deep brackets": {"type": "regex", "regex": "(" * 20_000 + "a" + ")" * 20_000},
    "products": {
        "schema": {"allOf": [{"anyOf": [{"properties": {f"p{n}": {"const": v}}} for v in (0, 1)]} for n in range(24)]}
    },
    "exponential references": {"schema": nested(22)},
    "only itself": {"schema": {"$ref": "#"}},
    "in a circle": {"schema": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
    "many properties": {"schema": properties(2000)},
    "a large multiple": {"schema": {"type": "integer", "multipleOf": 982_451_653}},
    "a large bound": {"schema": {"type": "integer", "minimum": 10**300}},
    "elsewhere": {"schema": {"$id": "http://127.0.0.1:1/", "$ref": "#/a/b"}},
    "exponential rules": lines(*(f"a{n}: a{n + 1} a{n + 1}" for n in range(40)), 'a40: "x"', "start: a0"),
    "exponential tokens": lines(*(f"A{n}: A{n + 1} A{n + 1}" for n in range(40)), 'A40: "x"', "start: A0"),
    "brackets in a grammar": lines("start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
    "optional rules": lines("start: " + " ".join(f"x{n}?" for n in range(2000)), *(f'x{n}: "a"' for n in range(2000))),
    "elsewhere in a grammar": lines('start: %json {"$ref": "http://127.0.0.1:1/"}'),
    "no grammar": lines("first: second"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_format_is_refused_in_bounded_time_and_memory(grammars: Grammars, name: str) -> None:
    asked = HOSTILE[name]
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(InvalidRequest, match="response_format") as refused:
        grammars.of(of_schema(asked["schema"]) if "schema" in asked else form(asked))
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert len(str(refused.value)) < 500
    assert str(refused.value).isprintable()
    # Of this process: the one that tried it out has its own limit.
    assert after.ru_utime - before.ru_utime < 5
    assert after.ru_maxrss - before.ru_maxrss < 200_000
    # Another format is still compiled.
    assert grammars.of(form({"type": "regex", "regex": f"{len(name)}a"}))


def test_a_process_that_a_grammar_has_ended_is_started_again() -> None:
    checker = GrammarChecker(TOKENS)
    try:
        with pytest.raises(GrammarRefused, match="too much"):
            checker.check(grammar_text(of_schema(INTERSECTIONS), with_blank=False))
        checker.check(grammar_text(form({"type": "json_object"}), with_blank=False))
    finally:
        checker.close()


def test_a_format_is_compiled_once_and_only_the_last_ones_are_kept(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT", 2)
    forms = [form({"type": "choice", "choice": [text]}) for text in ("first", "second", "third")]
    first = grammars.of(forms[0])
    assert grammars.of(forms[0]) is first
    for other in forms[1:]:
        grammars.of(other)
    assert grammars.of(forms[0]) is not first


def test_a_grammar_that_has_met_a_limit_is_compiled_again(grammars: Grammars) -> None:
    asked = form({"type": "choice", "choice": ["exhausted"]})
    grammar = grammars.of(asked)
    grammar.is_exhausted = True
    assert grammars.of(asked) is not grammar


def test_a_refusal_is_remembered(grammars: Grammars) -> None:
    asked = form(HOSTILE["a billion repeats"])
    with pytest.raises(InvalidRequest):
        grammars.of(asked)
    started = time.process_time()
    with pytest.raises(InvalidRequest):
        grammars.of(asked)
    assert time.process_time() - started < 0.2


def test_a_model_without_tokens_for_grammars_refuses_formats() -> None:
    with pytest.raises(InvalidRequest, match="leave it out"):
        Grammars(lambda: None).of(form({"type": "json_object"}))


def progress_in(asked: dict[str, Any], wanted: int = 9, **sampling: Any) -> RowProgress:
    one = row(wanted=wanted, eos_ids=frozenset({2}), **sampling)
    one.grammar = Grammar(TOKENIZER, grammar_text(form(asked), with_blank=False), drops_blank=False)
    return RowProgress(one, TOKENIZER.decode_str)


def end_of(progress: RowProgress, text: str, *more: int) -> Output:
    for token in (*TOKENIZER.greedy_tokenize(text), *more):
        assert not progress.row.is_done
        progress.take(TokenScore(token, 0.0), time.monotonic())
    return progress.row.output.result(0)


def test_a_row_ends_as_soon_as_nothing_more_can_follow() -> None:
    assert end_of(progress_in({"type": "choice", "choice": ["ab", "cd"]}), "cd").finish_reason == "stop"


def test_a_row_that_is_complete_with_its_last_token_has_not_been_cut() -> None:
    wanted = len(TOKENIZER.greedy_tokenize("cd"))
    asked = {"type": "choice", "choice": ["ab", "cd"]}
    assert end_of(progress_in(asked, wanted), "cd").finish_reason == "stop"
    assert end_of(progress_in({"type": "regex", "regex": "[a-z]{3,9}"}, wanted), "cd").finish_reason == "length"


def test_a_row_whose_text_may_end_goes_on_until_the_model_ends_it() -> None:
    assert end_of(progress_in({"type": "regex", "regex": "[a-z]+"}), "cd", 2).finish_reason == "stop"


def test_a_stop_string_ends_a_text_that_is_not_complete() -> None:
    output = end_of(progress_in({"type": "regex", "regex": "a+b"}, stop=("aa",)), "aa")
    assert output.finish_reason == "stop_sequence"


@pytest.mark.parametrize("token", [2, 1401, TOKENIZER.greedy_tokenize("c")[0]])
def test_a_token_that_the_grammar_does_not_have_ends_the_row_before_it(token: int) -> None:
    # As where the checkpoint's rules leave no token that the grammar allows.
    output = end_of(progress_in({"type": "regex", "regex": "a+b"}), "a", token)
    assert output.finish_reason == "length"
    assert TOKENIZER.decode_str(list(output.ids)) == "a"


def test_a_row_whose_grammar_needs_too_much_at_a_step_fails_and_the_next_one_compiles_it_again() -> None:
    progress = progress_in({"type": "regex", "regex": "(a?){5000}a{5000}"})
    progress.take(TokenScore(TOKENIZER.greedy_tokenize("a")[0], 0.0), time.monotonic())
    with pytest.raises(InvalidRequest, match="too much"):
        progress.row.output.result(0)
    assert progress.row.grammar
    assert progress.row.grammar.is_exhausted
