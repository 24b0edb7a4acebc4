"""Sampling draws from the right distribution, by the row's own seed and step alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TypicalLogitsWarper,
)

from tasks.sampling_fields import NEAR_GREEDY
from tests.support.rows import row
from worker.engine.row import Row, Sampling
from worker.engine.sampling import BatchSampler, RowSampler, RowSampling, drawn, keep_nucleus, keep_top_k, scaled

#: Logits of a toy vocabulary of six.
LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -torch.inf])
DRAWS = 20_000
STEPS = 25
NO_IDS = torch.empty(0)
CPU = torch.device("cpu")
#: A vocabulary that no vector of a processor divides.
VOCABULARY = 32_003
#: The chi-square statistic that one in 10,000 correct samples exceeds, by degrees of freedom.
CRITICAL = {1: 15.1, 3: 21.1, 4: 23.5, 63: 112.3}


def sampled(seed: int | None = 1, **options: Any) -> Row:
    return row(seed=seed, **{"temperature": 1.0, **options})


def sampler(**options: Any) -> RowSampler:
    return RowSampler(Sampling(max_new_tokens=1, **{"temperature": 1.0, "seed": 7, **options}))


def tokens(rows: list[Row], place: int = 0, steps: int = STEPS) -> list[int]:
    """What a row of a batch draws in so many steps on the same logits."""
    sampling = RowSampling(rows)
    return [int(sampling(NO_IDS, LOGITS.repeat(len(rows), 1))[place].argmax()) for _ in range(steps)]


def draws(logits: Tensor = LOGITS, **options: Any) -> Tensor:
    """What one row draws in its first steps on the same logits, the steps side by side (DRAWS,)."""
    one = sampler(**options)
    return BatchSampler(dict.fromkeys(range(DRAWS), one), CPU, len(logits)).draw(logits.expand(DRAWS, -1), range(DRAWS))


def draw_each(samplers: Mapping[int, RowSampler], logits: Tensor, steps: Sequence[int]) -> dict[int, int]:
    """The drawn tokens by row."""
    return dict(zip(samplers, BatchSampler(samplers, CPU, logits.shape[1]).draw(logits, steps).tolist(), strict=True))


def assert_distributed(found: Tensor, probabilities: Tensor) -> None:
    """Chi-square test of drawn tokens; tokens without probability are not drawn at all."""
    counts = torch.bincount(found, minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible].double() * len(found)
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    assert statistic < CRITICAL[int(possible.sum()) - 1]


def test_a_seed_always_draws_the_same() -> None:
    assert tokens([sampled(3)]) == tokens([sampled(3)])


def test_other_seeds_draw_otherwise() -> None:
    assert len({tuple(tokens([sampled(seed)])) for seed in range(10)}) == 10


def test_without_a_seed_each_job_draws_otherwise() -> None:
    assert tokens([sampled(None)]) != tokens([sampled(None)])


def test_a_large_seed_is_taken() -> None:
    assert tokens([sampled(2**63 - 1)]) != tokens([sampled(2**63 - 2)])


@pytest.mark.parametrize("place", range(4))
def test_a_rows_draws_do_not_depend_on_its_place_or_its_companions(place: int) -> None:
    companions = [row(), sampled(8), sampled(None, temperature=2.0, top_p=0.5)]
    batch = [*companions[:place], sampled(3), *companions[place:]]
    assert tokens(batch, place) == tokens([sampled(3)])


def test_two_rows_of_one_seed_draw_the_same_side_by_side() -> None:
    assert tokens([sampled(3), sampled(3)], 0) == tokens([sampled(3), sampled(3)], 1)


#: What rows of one batch may ask for.
PARAMETERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"top_p": 0.9},
    {"top_k": 40},
    {"top_k": 50_000, "top_p": 0.5, "temperature": 4.0},
    {"min_p": 0.05},
    {"typical_p": 0.8, "top_k": 100},
    {"epsilon_cutoff": 3e-4, "eta_cutoff": 1e-3},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_with_any_parameters_draw_in_a_batch_of_any_order_what_they_draw_alone(dtype: torch.dtype) -> None:
    rng = random.Random(1)
    torch.manual_seed(1)
    logits = (4 * torch.randn(40, VOCABULARY)).to(dtype)
    samplers = {n: sampler(seed=n, **PARAMETERS[n % len(PARAMETERS)]) for n in range(40) if n % 5}
    steps = [rng.randrange(1_000) for _ in samplers]
    together = draw_each(samplers, logits, steps)
    for (number, one), step in zip(samplers.items(), steps, strict=True):
        assert draw_each({0: one}, logits[[number]], [step]) == {0: together[number]}
    order = rng.sample(list(samplers), len(samplers))
    shuffled = dict(zip(order, range(len(order)), strict=True))
    by_place = {place: samplers[number] for number, place in shuffled.items()}
    steps_of = dict(zip(samplers, steps, strict=True))
    found = draw_each(by_place, logits[order], [steps_of[number] for number in order])
    assert {number: found[place] for number, place in shuffled.items()} == together


def test_a_greedy_rows_scores_are_left_as_they_are() -> None:
    scores = RowSampling([row(), sampled()])(NO_IDS, LOGITS.repeat(2, 1))
    assert torch.equal(scores[0], LOGITS)
    assert not torch.equal(scores[1], LOGITS)


def test_stock_generate_gets_the_tokens_of_the_continuous_path() -> None:
    expected = [draw_each({0: sampler(seed=3, top_p=0.9)}, LOGITS[None], [step])[0] for step in range(STEPS)]
    assert tokens([sampled(3, top_p=0.9)]) == expected


def test_numbers_are_uniform_over_steps_and_over_seeds() -> None:
    steps = [sampler(seed=5).uniform(step) for step in range(DRAWS)]
    seeds = [sampler(seed=seed).uniform(5) for seed in range(DRAWS)]
    for numbers in (steps, seeds):
        assert all(0 <= number < 1 for number in numbers)
        assert_distributed((torch.tensor(numbers, dtype=torch.float64) * 64).long(), torch.full((64,), 1 / 64))
    assert not set(steps) & set(seeds) - {sampler(seed=5).uniform(5)}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_draws_follow_the_softmax(temperature: float) -> None:
    assert_distributed(draws(temperature=temperature), (LOGITS / temperature).softmax(dim=0))


def test_top_p_draws_from_the_nucleus_only_and_in_proportion() -> None:
    # The first two have 0.56 + 0.21 = 0.77 of the probability: the fewest that reach 0.7.
    kept = LOGITS.clone()
    kept[2:] = -torch.inf
    assert_distributed(draws(top_p=0.7), kept.softmax(dim=0))


def test_a_tiny_nucleus_is_the_likeliest_token() -> None:
    assert not draws(top_p=0.01).any()


def test_top_p_of_one_cuts_nothing() -> None:
    assert tokens([sampled(3, top_p=1.0)]) == tokens([sampled(3)])


def test_a_temperature_near_zero_is_greedy() -> None:
    assert not draws(temperature=0.01).any()


def random_scores(rows: int, size: int, scale: float) -> Tensor:
    torch.manual_seed(size)
    return scaled(torch.randn(rows, size), torch.full((rows, 1), 1 / scale))


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 5.0, 100.0])
@pytest.mark.parametrize("size", [1, 2, 100, VOCABULARY])
def test_a_nucleus_is_that_of_transformers(size: int, scale: float) -> None:
    top_p = [1e-9, 0.1, 0.5, 0.9, 0.99, 0.999]
    scores = random_scores(len(top_p), size, scale)
    found = keep_nucleus(scores, torch.tensor(top_p, dtype=torch.float64)[:, None])
    for mine, before, part in zip(found, scores, top_p, strict=True):
        theirs = TopPLogitsWarper(part)(None, before[None].double())[0]
        chances, kept = before.double().softmax(dim=0), mine.isfinite()
        # Sums are rounded, and tokens as likely as the last one, within two millionths, are kept.
        assert chances[kept].sum() >= part - 1e-7
        assert chances[chances > chances[kept].min() * (1 + 3e-6)].sum() < part + 1e-7
        if scale >= 1 and size <= 100:
            assert torch.equal(kept, theirs.isfinite())
        assert torch.equal(mine[mine.isfinite()], before[mine.isfinite()])


def test_equally_likely_tokens_are_kept_or_cut_together() -> None:
    scores = torch.tensor([[0.0, -1.0, -1.0, -1.0, -2.0]])
    assert keep_nucleus(scores, torch.tensor([[0.5]], dtype=torch.float64)).isfinite().tolist() == [
        [True] * 4 + [False]
    ]
    assert keep_top_k(scores, torch.tensor([[2]]), 2).isfinite().tolist() == [[True] * 4 + [False]]


@pytest.mark.parametrize("size", [1, 30, 100])
def test_the_top_k_are_those_of_transformers(size: int) -> None:
    top_k = [1, 2, 29, 30, 31, 100, 1_000]
    scores = random_scores(len(top_k), size, 1.0)
    found = keep_top_k(scores, torch.tensor(top_k)[:, None], max(top_k))
    for mine, before, count in zip(found, scores, top_k, strict=True):
        assert torch.equal(mine, TopKLogitsWarper(count)(None, before[None])[0])


@pytest.mark.parametrize("temperature", [1.5, 3.0])
def test_truncations_apply_together_in_the_order_of_transformers(temperature: float) -> None:
    torch.manual_seed(2)
    logits = 2 * torch.randn(64)
    stock = LogitsProcessorList([
        TemperatureLogitsWarper(temperature), TopKLogitsWarper(30), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02),
        TypicalLogitsWarper(0.9), EpsilonLogitsWarper(0.01), EtaLogitsWarper(0.01),
    ])  # fmt: skip
    expected = stock(None, logits[None])[0].softmax(dim=0)
    found = draws(
        logits, temperature=temperature, top_k=30, top_p=0.9, min_p=0.02, typical_p=0.9,
        epsilon_cutoff=0.01, eta_cutoff=0.01,
    )  # fmt: skip
    counts = torch.bincount(found, minlength=64)
    assert torch.equal(counts > 0, expected > 0)
    assert 3 < (expected > 0).sum() < 30
    # Five standard deviations of a share.
    assert ((counts / DRAWS) - expected).abs().max() < 5 * (0.25 / DRAWS) ** 0.5


def test_the_largest_and_the_smallest_number_draw_tokens_with_probability() -> None:
    scores = torch.tensor([[-torch.inf, -1.0, 0.0, -30.0, -torch.inf]]).expand(2, -1)
    assert drawn(scores, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)).tolist() == [1, 2]


def test_infinite_logits_are_the_likeliest() -> None:
    assert set(draws(torch.tensor([1.0, torch.inf, 3.0, torch.inf])).tolist()) == {1, 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_over_the_whole_range_a_sample_is_a_likely_token(dtype: torch.dtype, scale: float) -> None:
    logits = (torch.tensor([3.0, 1.0, 2.0, 5.0, -4.0]) * scale).to(dtype)
    temperatures = [NEAR_GREEDY, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0]
    for temperature, top_p in itertools.product(temperatures, [None, 5e-324, 1e-9, 1.0]):
        rows = dict.fromkeys(range(20), sampler(temperature=temperature, top_p=top_p))
        found = BatchSampler(rows, CPU, len(logits)).draw(logits.expand(20, -1), range(20))
        assert ((found >= 0) & (found < 5)).all()
        if scale / temperature > 100 or (top_p or 1) < 0.1:
            assert (found == 3).all()
