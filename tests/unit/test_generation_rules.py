"""A checkpoint's rules, without those that change nothing."""

from __future__ import annotations

from typing import Any

import pytest

from worker.engine.generation_rules import NO_RULES, generation_rules


def test_bad_words_that_no_answer_contains_are_no_rule() -> None:
    rules = generation_rules({"bad_words_ids": [[7], [8], [7, 8]], "top_k": 5, "length_penalty": 2.0})
    assert rules.without_bad_words([[7], [8]]) == generation_rules(
        {"bad_words_ids": [[7, 8]], "top_k": 5, "length_penalty": 2.0}
    )
    assert generation_rules({"bad_words_ids": [[7], [8]]}).without_bad_words([[8], [7]]) == NO_RULES


@pytest.mark.parametrize(
    ("config", "depends"),
    [
        ({}, False),
        ({"length_penalty": 2.0, "top_k": 5}, False),
        ({"min_new_tokens": 5, "suppress_tokens": [7]}, False),
        ({"min_length": 5}, True),
        ({"suppress_tokens": [7], "repetition_penalty": 1.2}, True),
        ({"bad_words_ids": [[7, 8]]}, True),
    ],
)
def test_rules_that_count_or_read_the_prompt_depend_on_its_padding(config: dict[str, Any], depends: bool) -> None:
    assert generation_rules(config).depend_on_padding == depends
