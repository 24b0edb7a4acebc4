"""Rows have the model's prompt form, its bound and its ends."""

from __future__ import annotations

from typing import Any

import pytest

from config.settings import Settings
from tasks.errors import InvalidRequest, PromptTooLong
from tasks.payloads import parse
from worker.engine.generation_rules import NO_RULES
from worker.jobs.row_builder import RowBuilder, others, prompt_bound
from worker.models.fake import END, FakeCodec

IMAGE = "https://example.com/a.png"
TASKS: dict[str, dict[str, Any]] = {
    "caption": {"image": IMAGE},
    "answer": {"image": IMAGE, "question": "Who?"},
    "classify": {"image": IMAGE, "labels": ["cat", "dog"]},
    "write": {"images": [IMAGE]},
    "complete": {"prompt": ["Hello"]},
    "chat": {"messages": [{"role": "user", "content": "Hello"}]},
}


@pytest.mark.parametrize("task", TASKS)
def test_every_tasks_answer_ends_where_the_model_ends_one(task: str) -> None:
    job = parse(f"idefics.{task}", TASKS[task])
    row = RowBuilder(Settings(), FakeCodec(), NO_RULES).build(job, ["a"], 4)
    assert row.sampling.eos_ids == {END}


@pytest.mark.parametrize(("task", "beams"), [("caption", 4), ("classify", 1)])
def test_labels_are_scored_without_beams(task: str, beams: int) -> None:
    job = parse(f"idefics.{task}", {**TASKS[task], "num_beams": 4})
    assert RowBuilder(Settings(), FakeCodec(), NO_RULES).build(job, ["a"], 4).sampling.num_beams == beams


class Small(FakeCodec):
    """A codec of a model with ten tokens."""

    vocabulary = 10
    reserved_ids = frozenset({8})


@pytest.mark.parametrize(
    ("bias", "fault"), [({9: 100}, ""), ({10: -1}, "0 to 9"), ({8: 0.1}, "reserved"), ({8: -100}, ""), ({END: 5}, "")]
)
def test_a_bias_is_of_the_models_tokens_and_forces_no_reserved_one(bias: dict[int, float], fault: str) -> None:
    builder = RowBuilder(Settings(), Small(), NO_RULES)
    job = parse("idefics.complete", {**TASKS["complete"], "logit_bias": bias})
    if not fault:
        assert builder.build(job, ["a"], 4).sampling.logit_bias == tuple(bias.items())
        return
    with pytest.raises(InvalidRequest, match=f"logit_bias.*{fault}"):
        builder.build(job, ["a"], 4)


def test_further_samples_have_seeds_of_their_own_and_end_with_the_first() -> None:
    builder = RowBuilder(Settings(), FakeCodec(), NO_RULES)
    job = parse("idefics.complete", {**TASKS["complete"], "temperature": 1, "seed": 2**63 - 1, "n": 4})
    row, again = (builder.build(job, ["a"], 4, priority=3, deadline=9.0) for _ in range(2))
    rows = [row, *others(row)]
    seeds = [each.sampling.seed for each in rows]
    assert len(set(seeds)) == 4
    assert seeds[0] == 2**63 - 1
    assert seeds[1:] == [each.sampling.seed for each in others(again)]
    assert all((each.tokens, each.priority, each.deadline) == (row.tokens, 3, 9.0) for each in rows)
    assert all(each.tokens.is_repeated for each in rows)
    row.canceled = True
    assert {each.abort_reason(0.0) for each in rows} == {"canceled"}


@pytest.mark.parametrize(
    ("settings", "context", "bound", "cure"),
    [
        ({}, 2048, 2048, "fewer images"),
        ({}, 131_072, 65_536, "IDEFICS_MAX_BATCH_TOKENS"),
        ({"max_batch_tokens": 1000}, 2048, 1000, "IDEFICS_MAX_BATCH_TOKENS"),
        ({"max_prompt_tokens": 4096}, 2048, 4096, "IDEFICS_MAX_PROMPT_TOKENS"),
        ({"max_prompt_tokens": 10}, 2048, 10, "IDEFICS_MAX_PROMPT_TOKENS"),
    ],
)
def test_a_prompt_is_as_long_as_the_model_reads_unless_the_setting_says_otherwise(
    settings: dict[str, int], context: int, bound: int, cure: str
) -> None:
    found, told = prompt_bound(Settings(**settings), context)
    assert found == bound
    assert cure in told


def test_a_longer_prompt_than_the_model_reads_is_refused_with_its_cure() -> None:
    builder = RowBuilder(Settings(), FakeCodec(), NO_RULES)
    job = parse("idefics.complete", TASKS["complete"])
    builder.build(job, ["a" * FakeCodec.context_tokens], 4)
    with pytest.raises(PromptTooLong, match="takes 2048: shorten it or send fewer images"):
        builder.build(job, ["a" * (FakeCodec.context_tokens + 1)], 4)


def test_only_a_chat_loses_the_ends_of_utterances_that_its_model_does_not_know() -> None:
    class Base(FakeCodec):
        has_end_of_utterance = False

    builder = RowBuilder(Settings(), Base(), NO_RULES)
    assert builder.prompt(parse("idefics.chat", TASKS["chat"])) == ["User: Hello", "\nAssistant:"]
    asked = parse("idefics.complete", {"prompt": ["Hello<end_of_utterance>"]})
    assert builder.prompt(asked) == ["Hello<end_of_utterance>"]
