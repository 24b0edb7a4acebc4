"""Which rows run together, decided without running any."""

from __future__ import annotations

import random

import pytest

from tests.support.rows import row
from worker.engine.row import Row
from worker.engine.scheduler import Limits, next_batch, should_wait

WIDE = Limits(rows=100, tokens=1_000_000)


def test_nothing_waits_and_nothing_runs() -> None:
    assert next_batch([], WIDE) == []


def test_all_that_fit_run_together() -> None:
    rows = [row(arrived=n) for n in range(10)]
    assert set(next_batch(rows, WIDE)) == set(rows)


def test_what_waits_is_left_as_it_is() -> None:
    rows = [row(arrived=n) for n in range(3)]
    next_batch(rows, Limits(rows=1, tokens=100))
    assert len(rows) == 3
    assert next_batch(rows, WIDE) == next_batch(rows, WIDE)


# Order


def test_the_most_urgent_row_goes_first_even_if_others_came_earlier() -> None:
    late, early = row(priority=0, arrived=2), row(priority=9, arrived=1)
    assert next_batch([early, late], Limits(rows=1, tokens=100)) == [late]


def test_among_equals_the_oldest_goes_first_wherever_it_stands() -> None:
    rows = [row(arrived=3), row(arrived=1), row(arrived=2)]
    assert next_batch(rows, Limits(rows=1, tokens=100)) == [rows[1]]


def test_the_oldest_goes_first_although_others_would_fill_the_batch_better() -> None:
    oldest = row(wanted=1, arrived=0)
    alike = [row(wanted=50, arrived=n) for n in range(1, 5)]
    assert next_batch([*alike, oldest], Limits(rows=4, tokens=10_000))[0] is oldest


def test_urgent_rows_join_before_alike_ones() -> None:
    head, alike, urgent = row(priority=0, arrived=0), row(priority=9, arrived=1), row(priority=1, wanted=9, arrived=2)
    assert next_batch([head, alike, urgent], Limits(rows=2, tokens=1000)) == [head, urgent]


# Companions


def test_the_nearest_in_wanted_length_join_first() -> None:
    head = row(wanted=10, arrived=0)
    far, near, exact = row(wanted=100, arrived=1), row(wanted=12, arrived=2), row(wanted=10, arrived=3)
    assert next_batch([head, far, near, exact], Limits(rows=3, tokens=10_000)) == [head, exact, near]


def test_among_equal_wanted_lengths_the_nearest_prompts_join_first() -> None:
    head, far, near = row("a" * 10, arrived=0), row("a" * 90, arrived=1), row("a" * 12, arrived=2)
    assert next_batch([head, far, near], Limits(rows=2, tokens=10_000)) == [head, near]


def test_greedy_sampled_and_scored_rows_share_a_batch() -> None:
    rows = [row(arrived=0), row(temperature=1.0, arrived=1), row(labels=((1,), (2,)), arrived=2)]
    assert set(next_batch(rows, WIDE)) == set(rows)


def test_rows_with_and_without_beams_share_a_batch() -> None:
    rows = [row(arrived=0), row(beams=2, arrived=1), row(beams=4, wanted=11, arrived=2), row(beams=2, arrived=3)]
    assert set(next_batch(rows, WIDE)) == set(rows)


# Limits


def test_there_are_no_more_rows_than_allowed() -> None:
    assert len(next_batch([row(arrived=n) for n in range(10)], Limits(rows=4, tokens=10_000))) == 4


def test_a_row_with_four_beams_counts_four() -> None:
    assert len(next_batch([row(beams=4, arrived=n) for n in range(10)], Limits(rows=9, tokens=10_000))) == 2


def test_padding_and_answers_count_as_tokens() -> None:
    head, long = row("a" * 10, wanted=10, arrived=0), row("a" * 20, wanted=10, arrived=1)
    assert next_batch([head, long], Limits(rows=9, tokens=60)) == [head, long]
    assert next_batch([head, long], Limits(rows=9, tokens=59)) == [head]


def test_in_blocks_each_row_counts_with_its_own_tokens() -> None:
    head, long = row("a" * 10, wanted=10, arrived=0), row("a" * 70, wanted=10, arrived=1)
    assert next_batch([head, long], Limits(rows=9, tokens=1, block_tokens=100)) == [head, long]
    assert next_batch([head, long], Limits(rows=9, tokens=1, block_tokens=99)) == [head]
    assert next_batch([head, long], Limits(rows=9, tokens=100)) == [head]
    running = [row("a" * 60, wanted=0, arrived=0)]
    assert next_batch([head], Limits(rows=9, tokens=1, block_tokens=80), running) == [head]
    assert next_batch([head], Limits(rows=9, tokens=1, block_tokens=79), running) == []


def test_each_beam_has_an_answer_and_in_blocks_they_share_their_prompt() -> None:
    beams = [row("a" * 10, wanted=10, beams=2, arrived=n) for n in range(2)]
    assert next_batch(beams, Limits(rows=9, tokens=80)) == beams
    assert next_batch(beams, Limits(rows=9, tokens=79)) == beams[:1]
    assert next_batch(beams, Limits(rows=9, tokens=1, block_tokens=60)) == beams
    assert next_batch(beams, Limits(rows=9, tokens=1, block_tokens=59)) == beams[:1]


def test_a_row_that_does_not_fit_is_passed_over_for_one_that_does() -> None:
    head, huge, small = row("a" * 10, arrived=0), row("a" * 900, arrived=1), row("a" * 11, arrived=2)
    assert next_batch([head, huge, small], Limits(rows=9, tokens=100)) == [head, small]


@pytest.mark.parametrize("head", [row("a" * 999, arrived=0), row(beams=16, arrived=0)])
def test_a_row_beyond_the_limits_runs_alone(head: Row) -> None:
    companions = [row(arrived=1), row(beams=16, arrived=2), row("a" * 999, arrived=3)]
    assert next_batch([head, *companions], Limits(rows=8, tokens=500)) == [head]


# Admit


def test_those_that_fit_join_the_running_ones() -> None:
    running, waiting = [row(arrived=0), row(arrived=1)], [row(arrived=n) for n in range(2, 10)]
    assert next_batch(waiting, Limits(rows=5, tokens=1_000), running) == waiting[:3]


def test_the_running_rows_padding_counts() -> None:
    running, newcomer = [row("a" * 90, wanted=10, arrived=0)], row("a", wanted=1, arrived=1)
    assert next_batch([newcomer], Limits(rows=9, tokens=200), running) == [newcomer]
    assert next_batch([newcomer], Limits(rows=9, tokens=199), running) == []


def test_beams_join_a_batch_that_has_room_for_each_of_them() -> None:
    single, beams = row(arrived=0), row(beams=3, arrived=1)
    assert next_batch([beams], Limits(rows=4, tokens=1_000), [single]) == [beams]
    assert next_batch([beams], Limits(rows=3, tokens=1_000), [single]) == []
    assert next_batch([single], Limits(rows=4, tokens=1_000), [beams]) == [single]
    assert next_batch([single], Limits(rows=3, tokens=1_000), [beams]) == []


def test_no_row_overtakes_the_first_one_that_cannot_join() -> None:
    head, small = row("a" * 999, arrived=1), row("a", arrived=2)
    assert next_batch([head, small], Limits(rows=9, tokens=500), [row(arrived=0)]) == []


def test_a_full_batch_admits_no_row() -> None:
    assert next_batch([row(arrived=9)], Limits(rows=4, tokens=1_000), [row(arrived=n) for n in range(4)]) == []


# Properties


def random_row(dice: random.Random, arrived: float) -> Row:
    return row(
        "a" * dice.choice([1, 5, 20, 80, 400]),
        wanted=dice.choice([1, 4, 16, 64, 300]),
        beams=dice.choice([1, 1, 1, 2, 4, 16]),
        priority=dice.randrange(10),
        labels=((1,), (2,)) if dice.random() < 0.1 else (),
        arrived=arrived,
    )


def check_limits(batch: list[Row], limits: Limits) -> None:
    beams = sum(row.sampling.num_beams for row in batch)
    longest = max(len(row.tokens.ids) + row.max_steps for row in batch)
    if len(batch) > 1:
        assert beams <= limits.rows
        assert beams * longest <= limits.tokens


@pytest.mark.parametrize("seed", range(50))
def test_every_waiting_row_runs_once_and_within_the_limits(seed: int) -> None:
    dice = random.Random(seed)
    limits = Limits(rows=dice.choice([1, 4, 16]), tokens=dice.choice([50, 500, 5_000]))
    rows = [random_row(dice, arrived) for arrived in range(dice.randrange(1, 80))]
    waiting, ran = list(rows), []
    while waiting:
        batch = next_batch(waiting, limits)
        assert batch, "rows wait and none runs"
        assert set(batch) <= set(waiting)
        check_limits(batch, limits)
        waiting = [row for row in waiting if row not in batch]
        ran += batch
    assert len(ran) == len(set(ran)) == len(rows)


@pytest.mark.parametrize("seed", range(10))
def test_later_rows_of_the_same_priority_never_starve_a_row(seed: int) -> None:
    dice = random.Random(seed)
    limits = Limits(rows=4, tokens=2_000)
    odd = row("a" * 400, wanted=300, beams=2, arrived=0)
    older = [row("a", wanted=1, arrived=-n) for n in range(1, 9)]
    waiting = [*older, odd]
    for turn in range(len(older) + 1):
        batch = next_batch(waiting, limits)
        if odd in batch:
            return
        newcomers = [row("a", wanted=dice.randrange(1, 5), arrived=1 + turn) for _ in range(8)]
        waiting = [row for row in waiting if row not in batch] + newcomers
    pytest.fail("the row still waits although all that was older has run")


@pytest.mark.parametrize("seed", range(10))
def test_beams_and_single_rows_that_keep_arriving_start_at_once(seed: int) -> None:
    dice = random.Random(seed)
    #: The rows that run, with the steps that each still takes.
    running: dict[Row, int] = {}
    for now in range(100):
        arriving = [row(wanted=6, beams=beams, arrived=now) for beams in (1, 4) if dice.random() < 0.7]
        running = {each: steps - 1 for each, steps in running.items() if steps > 1}
        assert set(next_batch(arriving, Limits(rows=64, tokens=10_000), list(running))) == set(arriving)
        running |= dict.fromkeys(arriving, 6)


@pytest.mark.parametrize(
    ("running", "waiting", "coming", "expected"),
    [
        (0, 0, 1, True),
        (10, 13, 1, True),
        (10, 14, 1, False),
        (24, 0, 8, False),
        (3, 0, 0, False),
        (17, 0, 4, False),
        (16, 0, 4, True),
    ],
)
def test_a_batch_waits_for_coming_rows_until_it_is_three_quarters_full(
    running: int, waiting: int, coming: int, expected: bool
) -> None:
    assert should_wait(running, waiting, coming, Limits(rows=32, tokens=9999)) is expected
