"""Sampling by the Gumbel-max trick: the right distribution, from the row's own seed alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from tasks.payload_fields import NEAR_GREEDY
from tests.support.rows import row
from worker.engine.row import Row, Sampling
from worker.engine.sampling import RowSampler, RowSampling

#: Logits of a toy vocabulary of six.
LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -torch.inf])
DRAWS = 4_000
STEPS = 25
NO_IDS = torch.empty(0)


def sampled(seed: int | None = 1, **options: Any) -> Row:
    return row(seed=seed, **{"temperature": 1.0, **options})


def tokens(rows: list[Row], place: int = 0, steps: int = STEPS) -> list[int]:
    """What a row of a batch draws in so many steps on the same logits."""
    sampling = RowSampling(rows)
    return [int(sampling(NO_IDS, LOGITS.repeat(len(rows), 1))[place].argmax()) for _ in range(steps)]


def shares(**options: Any) -> Tensor:
    """How often each token is drawn."""
    sampler = RowSampler(Sampling(max_new_tokens=1, **{"temperature": 1.0, "seed": 7, **options}))
    counts = Counter(int(sampler.perturb(LOGITS.clone()).argmax()) for _ in range(DRAWS))
    return torch.tensor([counts[token] / DRAWS for token in range(len(LOGITS))])


def test_a_seed_always_draws_the_same() -> None:
    assert tokens([sampled(3)]) == tokens([sampled(3)])


def test_other_seeds_draw_otherwise() -> None:
    assert len({tuple(tokens([sampled(seed)])) for seed in range(10)}) == 10


def test_without_a_seed_each_job_draws_otherwise() -> None:
    assert tokens([sampled(None)]) != tokens([sampled(None)])


@pytest.mark.parametrize("place", range(4))
def test_a_rows_draws_do_not_depend_on_its_place_or_its_companions(place: int) -> None:
    companions = [row(), sampled(8), sampled(None, temperature=2.0, top_p=0.5)]
    batch = [*companions[:place], sampled(3), *companions[place:]]
    assert tokens(batch, place) == tokens([sampled(3)])


def test_two_rows_of_one_seed_draw_the_same_side_by_side() -> None:
    assert tokens([sampled(3), sampled(3)], 0) == tokens([sampled(3), sampled(3)], 1)


def test_a_greedy_rows_scores_are_left_as_they_are() -> None:
    scores = RowSampling([row(), sampled()])(NO_IDS, LOGITS.repeat(2, 1))
    assert torch.equal(scores[0], LOGITS)
    assert not torch.equal(scores[1], LOGITS)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_draws_follow_the_softmax(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(dim=0)
    # Four standard deviations of a share in so many draws.
    assert (shares(temperature=temperature) - expected).abs().max() < 4 * (0.25 / DRAWS) ** 0.5


def test_a_token_without_probability_is_never_drawn() -> None:
    assert shares(temperature=10.0)[5] == 0


def test_top_p_draws_from_the_nucleus_only_and_in_proportion() -> None:
    # The first two have 0.56 + 0.21 = 0.77 of the probability: the fewest that reach 0.7.
    drawn = shares(top_p=0.7)
    assert drawn[2:].sum() == 0
    expected = LOGITS[:2].softmax(dim=0)
    assert (drawn[:2] - expected).abs().max() < 4 * (0.25 / DRAWS) ** 0.5


def test_a_tiny_nucleus_is_the_likeliest_token() -> None:
    assert shares(top_p=0.01)[0] == 1


def test_top_p_of_one_cuts_nothing() -> None:
    assert tokens([sampled(3, top_p=1.0)]) == tokens([sampled(3)])


def test_a_temperature_near_zero_is_greedy() -> None:
    assert shares(temperature=0.01)[0] == 1


def test_half_precision_scores_stay_half_precision() -> None:
    sampler = RowSampler(Sampling(max_new_tokens=1, temperature=1.0, seed=1))
    assert sampler.perturb(LOGITS.to(torch.bfloat16)).dtype == torch.bfloat16


def test_a_large_seed_is_taken() -> None:
    assert tokens([sampled(2**63 - 1)]) != tokens([sampled(2**63 - 2)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [NEAR_GREEDY, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("top_p", [None, 5e-324, 1e-9, 1.0])
def test_over_the_whole_range_a_sample_is_a_number_and_a_likely_token(
    dtype: torch.dtype, temperature: float, scale: float, top_p: float | None
) -> None:
    logits = (torch.tensor([3.0, 1.0, 2.0, 5.0, -4.0]) * scale).to(dtype)
    sampler = RowSampler(Sampling(max_new_tokens=1, temperature=temperature, top_p=top_p, seed=1))
    for _ in range(20):
        perturbed = sampler.perturb(logits.clone())
        assert not perturbed.isnan().any()
        assert not perturbed.isposinf().any()
        if scale / temperature > 100 or (top_p or 1) < 0.1:
            assert int(perturbed.argmax()) == 3
