"""How many rows run at once after memory was short."""

from __future__ import annotations

from worker.engine.ceiling import FIRST_PROOF, LONGEST_PROOF, Ceiling


def good(ceiling: Ceiling, batches: int) -> list[int]:
    """The ceiling after each of so many full batches."""
    heights = []
    for _ in range(batches):
        ceiling.ran_well(ceiling.rows)
        heights.append(ceiling.rows)
    return heights


def test_a_ceiling_that_was_lowered_once_comes_back() -> None:
    ceiling = Ceiling(64)
    ceiling.lower(16)
    assert ceiling.rows == 8
    heights = good(ceiling, 6 * FIRST_PROOF)
    assert heights[:2] == [8, 8]
    assert heights == sorted(heights)
    assert heights[-1] == 64


def test_a_ceiling_of_one_row_rises_again() -> None:
    ceiling = Ceiling(64)
    ceiling.lower(2)
    assert ceiling.rows == 1
    assert good(ceiling, 100)[-1] == 64


def test_batches_below_the_ceiling_do_not_raise_it() -> None:
    ceiling = Ceiling(64)
    ceiling.lower(32)
    for _ in range(1_000):
        ceiling.ran_well(15)
    assert ceiling.rows == 16


def test_a_limit_that_is_hit_again_is_tried_less_often() -> None:
    ceiling, tries = Ceiling(64), 0
    for _ in range(1_000):
        if ceiling.rows > 8:
            tries += 1
            ceiling.lower(ceiling.rows)
        else:
            ceiling.ran_well(ceiling.rows)
    assert 0 < tries <= 1_000 / LONGEST_PROOF + 8
    assert ceiling.rows >= 4


def test_a_row_that_does_not_fit_alone_does_not_lower_the_ceiling() -> None:
    ceiling = Ceiling(64)
    ceiling.lower(2)
    ceiling.restore(64)
    assert ceiling.rows == 64
