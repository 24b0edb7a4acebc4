"""Penalties and biases change tokens as in stock transformers, and each answer says how likely it is: on every path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from config.settings import Settings
from tasks import Complete
from tests.model.conftest import Served, random_model
from tests.model.jobs import mixed_jobs, row_of, stock_processors
from tests.model.test_kv_blocks import with_blocks
from worker.engine.engine import Engine
from worker.engine.interfaces import Model
from worker.engine.row import Output, Row, TokenScore
from worker.engine.scheduler import Limits
from worker.jobs.runs import JobContext
from worker.jobs.service import Service

WANTED = 9
OPTIONS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.6, "logprobs": 3},
    {"frequency_penalty": 1.5, "presence_penalty": -0.5},
    {"logit_bias": ((300, 100.0), (301, 99.0)), "frequency_penalty": 1.9, "logprobs": 0},
    {"logit_bias": ((7, -100.0),), "repetition_penalty": 0.7, "presence_penalty": 2.0, "logprobs": 20},
    {"num_beams": 3, "logprobs": 2},
    {"num_beams": 2, "repetition_penalty": 1.4, "frequency_penalty": 1.0, "logit_bias": ((9, 3.0),), "answers": 2},
]


@torch.inference_mode()
def stock_outputs(served: Served, row: Row, inputs: Any) -> list[Output]:
    """What stock `generate` says to one prompt, and how likely its tokens are by its own scores."""
    sampling, length = row.sampling, len(row.tokens.ids)
    found = served.stock.adapter.model.generate(
        **inputs,
        do_sample=False,
        num_beams=sampling.num_beams,
        num_return_sequences=sampling.answers,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=sorted(sampling.eos_ids),
        bad_words_ids=served.stock.codec.bad_words_ids,
        logits_processor=stock_processors(sampling, length),
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    beams = getattr(found, "beam_indices", None)
    outputs = []
    for number, ids in enumerate(found.sequences[:, length:].tolist()):
        end = next((n for n, token in enumerate(ids) if token in sampling.eos_ids), None)
        counted = ids if end is None else ids[: end + 1]
        rows = [0 if beams is None else int(beams[number, step]) for step in range(len(counted))]
        steps = [found.scores[step][row].log_softmax(dim=-1) for step, row in enumerate(rows)]
        scores = [
            TokenScore(token, float(step[token]), _top(step, sampling.logprobs or 0))
            for token, step in zip(counted, steps, strict=True)
        ]
        confidence = math.exp(math.fsum(score.logprob for score in scores) / len(scores))
        shown = () if sampling.logprobs is None else tuple(scores[:end])
        outputs.append(Output(tuple(ids[:end]), "length" if end is None else "stop", (), confidence, shown))
    return outputs


def _top(step: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    values, ids = step.topk(count)
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))


def run(model: Model, rows: Sequence[Row]) -> list[Output]:
    engine = Engine(model, Limits(rows=32, tokens=20_000))
    for row in rows:
        engine.submit(row)
    engine.start()
    try:
        return [row.output.result(120) for row in rows]
    finally:
        engine.stop()


def assert_like(found: Output, expected: Output) -> None:
    assert (found.ids, found.finish_reason) == (expected.ids, expected.finish_reason)
    assert found.confidence == pytest.approx(expected.confidence, rel=1e-3)
    assert [score.id for score in found.scores] == [score.id for score in expected.scores]
    for score, other in zip(found.scores, expected.scores, strict=True):
        assert score.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [logprob for _, logprob in score.top] == pytest.approx([logprob for _, logprob in other.top], abs=1e-3)
        assert {id for id, _ in score.top[:1]} == {id for id, _ in other.top[:1]}


@pytest.fixture(scope="module")
def in_blocks(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return random_model(tmp_path_factory.mktemp("blocks") / "checkpoint", "with resampler", "blocks")


@pytest.mark.parametrize("served", ["with resampler", "idefics2 chat, in blocks", "smolvlm chat"], indirect=True)
def test_each_answer_and_its_scores_are_those_of_stock_transformers_alone(served: Served) -> None:
    jobs = [job.model_copy(update={"max_new_tokens": WANTED}) for job in mixed_jobs(7, sorted(served.images), seed=5)]
    rows, expected = [], []
    for job, options in zip(jobs, OPTIONS, strict=True):
        parts = served.parts(job)
        row = row_of(served.model, job, parts)
        row = Row(row.tokens, replace(row.sampling, **options))
        rows.append(row)
        expected.append(stock_outputs(served, row, served.stock_inputs(parts)))
    # That what they ask for matters.
    plain = [Row(row.tokens, replace(rows[0].sampling, max_new_tokens=WANTED)) for row in rows[1:5]]
    answers = [outputs[0].ids for outputs in expected[1:5]]
    assert all(output.ids != ids for output, ids in zip(run(served.model, plain), answers, strict=True))
    for model in (served.model, served.stock):
        for found, outputs in zip(run(model, [Row(row.tokens, row.sampling) for row in rows]), expected, strict=True):
            for each, output in zip((found, *found.others), outputs, strict=True):
                assert_like(each, output)


def test_samples_have_the_probabilities_before_temperature_and_truncation(in_blocks: Served) -> None:
    job = Complete.model_validate({"prompt": ["Say what you see."], "max_new_tokens": WANTED})
    greedy = row_of(in_blocks.model, job, in_blocks.parts(job))
    options = {"temperature": 3.0, "seed": 4, "min_p": 0.01, "presence_penalty": 1.0, "logprobs": 1}
    sampled = Row(greedy.tokens, replace(greedy.sampling, **options))
    together, alone = (run(model, [Row(sampled.tokens, sampled.sampling), Row(greedy.tokens, greedy.sampling)])[0]
                       for model in (in_blocks.model, in_blocks.stock))  # fmt: skip
    assert_like(together, alone)
    assert any(score.id != score.top[0][0] for score in together.scores)
    assert all(score.logprob <= score.top[0][1] for score in together.scores)


def test_a_preempted_row_goes_on_with_its_penalties_and_scores(in_blocks: Served) -> None:
    prompt = row_of(in_blocks.model, Complete.model_validate({"prompt": ["Say " * 20]}), ["Say " * 20])
    options = [{**options, "answers": 1, "num_beams": 1} for options in OPTIONS]
    rows = [Row(prompt.tokens, replace(prompt.sampling, max_new_tokens=40, eos_ids=frozenset(), **each))
            for each in options]  # fmt: skip
    expected = run(in_blocks.model, [Row(row.tokens, row.sampling) for row in rows])
    small = with_blocks(in_blocks, 20, prefix_bytes=0)
    found = run(small, rows)
    assert small.metrics()["preemptions"] > 0
    for one, other in zip(found, expected, strict=True):
        assert_like(one, other)


def test_several_answers_share_a_prefill_and_have_seeds_of_their_own(in_blocks: Served) -> None:
    model = in_blocks.model
    engine = Engine(model, Limits(rows=2, tokens=20_000))
    service = Service(Settings(model="demo"), model.info, model.codec, engine, rules=model.rules)
    asked = {"prompt": ["Say what you see here, " * 8], "max_new_tokens": 6, "temperature": 3.0, "seed": 11}
    engine.start()
    try:
        alone = service.run(Complete.model_validate(asked), JobContext("a"))
        prefixes, hits = (model.metrics()[name] for name in ("prefixes", "prefix_hits"))
        result = service.run(Complete.model_validate({**asked, "n": 4, "logprobs": 1}), JobContext("b"))
    finally:
        engine.stop()
    assert result.choices
    assert [result.text, result.confidence] == [result.choices[0].text, result.choices[0].confidence]
    assert result.text == alone.text
    assert result.confidence == pytest.approx(alone.confidence, rel=1e-3)
    assert len({choice.text for choice in result.choices}) == 4
    assert result.usage.completion_tokens == sum(len(choice.logprobs or ()) for choice in result.choices)
    # One of the pictureless prompt, which every row begins with.
    assert model.metrics()["prefixes"] - prefixes == 1
    assert model.metrics()["prefix_hits"] - hits == 4
