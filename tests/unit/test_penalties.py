"""Penalties and biases change logits as transformers' processors and OpenAI's definition do, in any company."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.jobs import stock_processors
from worker.engine.penalties import Penalties, StockPenalties
from worker.engine.progress import RowProgress
from worker.engine.row import Row, Sampling, Tokens, TokenScore

CPU = torch.device("cpu")
VOCABULARY = 50
OPTIONS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.7},
    {"presence_penalty": 0.9},
    {"frequency_penalty": -1.3, "presence_penalty": 0.4},
    {"logit_bias": ((3, 100.0), (9, -100.0))},
    {"logit_bias": ((3, 1.5),), "repetition_penalty": 0.6, "frequency_penalty": 2.0, "presence_penalty": -2.0},
]


def row(rng: random.Random, options: dict[str, Any]) -> Row:
    ids = tuple(rng.choices(range(VOCABULARY), k=rng.randint(1, 9)))
    return Row(Tokens(ids), Sampling(100, **options))


def expected(row: Row, new: list[int], logits: Tensor) -> Tensor:
    """One row's logits (vocabulary) after transformers' own processors."""
    ids = torch.tensor([[*row.tokens.ids, *new]])
    changed: Tensor = stock_processors(row.sampling, len(row.tokens.ids))(ids, logits[None].clone())[0]
    return changed


def test_rows_that_join_leave_and_move_change_their_logits_as_alone() -> None:
    rng = random.Random(1)
    torch.manual_seed(1)
    penalties = Penalties(CPU)
    running: dict[int, RowProgress] = {}
    for step in range(40):
        if step % 4 == 0:
            rows = [run for run in running.values() if rng.random() < 0.7]
            rows += [RowProgress(row(rng, rng.choice(OPTIONS)), str) for _ in range(3)]
            running = dict(zip(rng.sample(range(20), len(rows)), rows, strict=True))
        logits = 3 * torch.randn(20, VOCABULARY)
        logits[:, 7] = -torch.inf
        changed = penalties.apply(logits.clone(), running)
        for place in range(20):
            run = running.get(place)
            assert torch.equal(
                changed[place], expected(run.row, list(run.new), logits[place]) if run else logits[place]
            )
        for run in running.values():
            run.take(TokenScore(rng.randrange(VOCABULARY), -1.0), 1.0)


def test_without_such_rows_the_logits_stay_the_same_tensor() -> None:
    logits = torch.randn(2, VOCABULARY, dtype=torch.bfloat16)
    plain = RowProgress(row(random.Random(), {"repetition_penalty": 1.0}), str)
    assert Penalties(CPU).apply(logits, {0: plain}) is logits


def test_in_half_precision_changes_are_not_rounded_away() -> None:
    logits = torch.full((1, VOCABULARY), 64.0, dtype=torch.bfloat16)
    biased = RowProgress(row(random.Random(), {"logit_bias": ((4, 0.01),)}), str)
    assert Penalties(CPU).apply(logits, {0: biased})[0].argmax() == 4


@pytest.mark.parametrize("beams", [1, 3])
def test_stock_generate_gets_the_same_changes_for_each_beam(beams: int) -> None:
    rng = random.Random(2)
    torch.manual_seed(2)
    rows = [row(rng, options) for options in OPTIONS]
    length = max(len(each.tokens.ids) for each in rows)
    processor = StockPenalties(rows, beams, length, CPU)
    for count in range(4):
        new = [rng.choices(range(VOCABULARY), k=count) for _ in range(len(rows) * beams)]
        padding = [[0] * (length - len(each.tokens.ids)) + list(each.tokens.ids) for each in rows for _ in range(beams)]
        ids = torch.tensor([[*prompt, *more] for prompt, more in zip(padding, new, strict=True)])
        scores = torch.randn(len(new), VOCABULARY)
        changed = processor(ids, scores.clone())
        for place, more in enumerate(new):
            assert torch.equal(changed[place], expected(rows[place // beams], more, scores[place]))
