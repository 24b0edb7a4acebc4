"""Answers keep to the form that their job asks for: on every family and path, in any company, token for token as stock
`generate` with a LogitsProcessor of llguidance for that job alone."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jsonschema import Draft202012Validator
from llguidance import LLMatcher, LLTokenizer
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks.structured import valid
from tasks import Job
from tasks.payloads import parse
from tests.model.conftest import Served
from tests.model.jobs import mixed_jobs, row_of
from worker.engine.engine import Engine
from worker.engine.grammar import Grammar
from worker.engine.row import Row
from worker.engine.sampling import RowSampling
from worker.engine.scheduler import Limits
from worker.jobs.grammar_text import grammar_text

PRODUCT = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "price": {"type": "number"},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 60}, "maxItems": 3},
        "colour": {"enum": ["red", "dark red", "blå"]},
    },
    "required": ["name", "colour"],
    "additionalProperties": False,
}
FORMATS: list[dict[str, Any]] = [
    {"type": "json_schema", "json_schema": {"name": "product", "schema": PRODUCT}},
    {"type": "regex", "regex": r"[A-Z][a-z]{2,8}( [a-z]{2,8}){1,3}\."},
    {"type": "choice", "choice": ["a cat", "a dog", "two dogs / cats"]},
    {"type": "grammar", "grammar": 'start: sum\nsum: NUMBER | sum " + " NUMBER\nNUMBER: /[0-9]{1,3}/\n'},
    {"type": "json_object"},
]


def jobs_in_company(served: Served) -> list[Job]:
    """Jobs with a form, greedy and sampled, between others."""
    rng = random.Random(3)
    names = sorted(served.images)
    jobs = [job.model_copy(update={"max_new_tokens": 8}) for job in mixed_jobs(4, names, seed=5)]
    for number, form in enumerate(FORMATS):
        asked = {
            "image": {"path": rng.choice(names)},
            "question": "What is it?",
            "response_format": form,
            "max_new_tokens": 20 if number else 30,
        }
        sampled = {"temperature": 1.4, "top_p": 0.95, "seed": number} if number % 3 == 1 else {}
        jobs.insert(2 * number, parse("idefics.answer", {**asked, **sampled}))
    return jobs


def row_in_form(served: Served, job: Job, tokenizer: LLTokenizer) -> Row:
    """As the service makes it, but that the grammar is not tried out in another process."""
    row = row_of(served.model, job, served.parts(job))
    sampled = {name: getattr(job, name) for name in ("temperature", "top_p", "seed")}
    row.sampling = replace(row.sampling, **sampled)
    form = getattr(job, "response_format", None)
    row.grammar = Grammar(tokenizer, grammar_text(form, with_blank=True), drops_blank=True) if form else None
    return row


class Reference(LogitsProcessor):  # type: ignore[misc]
    """Masks the scores of one prompt's answer by llguidance alone."""

    def __init__(self, grammar: Grammar, tokenizer: LLTokenizer, prompt: int) -> None:
        self._matcher = LLMatcher(tokenizer, grammar.definition, log_level=0)
        self._prompt = prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._matcher.reset()
        new = input_ids[0, self._prompt :].tolist()
        assert self._matcher.consume_tokens(new)
        allowed = torch.tensor([list(self._matcher.compute_logit_bias())])
        return scores.masked_fill(allowed[:, : scores.shape[1]] == 0, -torch.inf)


@torch.inference_mode()
def expected(served: Served, job: Job, row: Row, tokenizer: LLTokenizer) -> list[int]:
    """What stock `generate` says to one prompt, up to its end."""
    inputs = served.stock_inputs(served.parts(job))
    length = inputs["input_ids"].shape[1]
    assert row.grammar
    new = served.stock.adapter.model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=row.sampling.max_new_tokens,
        eos_token_id=sorted(row.sampling.eos_ids),
        bad_words_ids=served.stock.codec.bad_words_ids,
        logits_processor=LogitsProcessorList([Reference(row.grammar, tokenizer, length), RowSampling([row])]),
    )[0, length:].tolist()
    end = next((place for place, token in enumerate(new) if token in row.sampling.eos_ids), len(new))
    return list(new[:end])


def run_in_company(served: Served, rows: Sequence[Row]) -> None:
    engine = Engine(served.model, Limits(rows=len(rows), tokens=20_000))
    for row in rows[: len(rows) // 2]:
        engine.submit(row)
    engine.start()
    try:
        for row in rows[len(rows) // 2 :]:
            engine.submit(row)
        for row in rows:
            row.output.result(120)
    finally:
        engine.stop()


def assert_fits(form: dict[str, Any], text: str) -> None:
    if form["type"] == "json_schema":
        Draft202012Validator(form["json_schema"]["schema"]).validate(json.loads(text))
    elif form["type"] == "json_object":
        assert isinstance(json.loads(text), dict)
    elif form["type"] == "choice":
        assert text in form["choice"]
    else:
        pattern = form["regex"] if form["type"] == "regex" else r"[0-9]{1,3}( \+ [0-9]{1,3})*"
        assert re.fullmatch(pattern, text), text


def test_answers_in_a_form_are_those_of_stock_generate_in_any_company_and_on_both_paths(served: Served) -> None:
    tokenizer = served.model.codec.grammar_tokens().tokenizer()
    jobs = jobs_in_company(served)
    rows = [row_in_form(served, job, tokenizer) for job in jobs]
    again = [row_in_form(served, job, tokenizer) for job in jobs]
    run_in_company(served, rows)
    served.stock.run(again, lambda: None, lambda running: ())
    fitted = 0
    for job, row, other in zip(jobs, rows, again, strict=True):
        output = row.output.result()
        assert other.output.result() == output
        if not row.grammar:
            continue
        assert list(output.ids) == expected(served, job, row, tokenizer), job
        if output.finish_reason == "stop":
            assert_fits(job.model_dump(mode="json")["response_format"], row.grammar.text(output.ids))
            fitted += 1
    assert fitted >= 2


def test_random_answers_in_random_forms_are_all_valid() -> None:
    found = valid(count=100)
    assert found["answers"] >= 100
    assert found["wrong"] == 0
    assert found["cut"] < 20
