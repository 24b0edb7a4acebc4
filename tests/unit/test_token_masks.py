"""Masks of the tokens that grammars allow, in batches of rows with and without one."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from worker.engine.grammar import Grammar, GrammarState, GrammarTokens
from worker.engine.token_masks import TokenMasks
from worker.models import DEMO

TOKENIZER = GrammarTokens((DEMO / "tokenizer.json").read_text(), 1403, (2, 1402)).tokenizer()
GRAMMAR = Grammar(TOKENIZER, json.dumps({"grammars": [{"lark_grammar": "start: /[0-9]{2}/"}]}), drops_blank=False)
#: Tokens of one digit.
DIGITS = [TOKENIZER.greedy_tokenize(str(digit))[0] for digit in range(10)]


def allowed(logits: Tensor) -> list[int]:
    """The tokens of a row (vocabulary,) that are possible."""
    return torch.nonzero(logits > -torch.inf)[:, 0].tolist()


def next_state(masks: TokenMasks, *states: GrammarState) -> None:
    for state in states:
        assert state.take(DIGITS[1])
    masks.compute(states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("places", [(0, 1, 2), (0, 2), (1,)])
def test_rows_with_a_grammar_have_its_tokens_alone_and_others_all(places: tuple[int, ...], dtype: torch.dtype) -> None:
    masks = TokenMasks([DIGITS[7]], torch.device("cpu"))
    states = {place: GrammarState(GRAMMAR) for place in places}
    for step in range(2):
        logits = torch.randn(3, 1403).to(dtype)
        before = logits.clone()
        masks.apply(logits, states)
        for place in range(3):
            mine = allowed(logits[place])
            if place not in places:
                mine = list(range(1403))
            else:
                assert set(DIGITS) - set(mine) == {DIGITS[7]}
                assert 9 <= len(mine) < 300
            assert torch.equal(logits[place, mine], before[place, mine])
        if not step:
            next_state(masks, *states.values())


def test_masks_that_were_computed_at_different_steps_stay_with_their_rows() -> None:
    masks = TokenMasks([], torch.device("cpu"))
    first, second, third = (GrammarState(GRAMMAR) for _ in range(3))
    next_state(masks, first, second)
    masks.compute([third])
    ended = GrammarState(GRAMMAR)
    next_state(masks, ended)
    next_state(masks, ended)
    for states in ([third, first], [second, ended, third]):
        logits = torch.zeros(len(states), 1403)
        masks.apply(logits, dict(enumerate(states)))
        counts = {state: len(allowed(row)) for state, row in zip(states, logits, strict=True)}
        # Two digits may follow, or one.
        assert counts[third] == max(counts.values())
        assert all(count >= 10 for state, count in counts.items() if state is not ended)
        assert counts.get(ended, 0) <= 2


def test_a_row_with_nan_keeps_it_whatever_its_grammar_allows() -> None:
    masks = TokenMasks([], torch.device("cpu"))
    logits = torch.zeros(2, 1403)
    logits[0, 5], logits[1, 6] = math.nan, math.inf
    masks.apply(logits, {place: GrammarState(GRAMMAR) for place in range(2)})
    assert logits[0].isnan().any()
    assert not logits[1].isnan().any()
    assert logits[1, 6] == -math.inf
