"""Who runs again with whom: the plan alone, and a simulation of whole afternoons of deaths."""

from __future__ import annotations

import random
from collections import Counter, deque

import pytest

from worker.pool.quarantine import ALONE, MAX_DEATHS_ALONE, groups


def test_every_suspect_is_in_one_group_in_order() -> None:
    for number in range(200):
        suspects = list(range(number))
        assert [suspect for group in groups(suspects) for suspect in group] == suspects
        assert all(groups(suspects))


@pytest.mark.parametrize("number", range(1, ALONE + 1))
def test_few_suspects_run_alone(number: int) -> None:
    assert ALONE == 8
    assert groups(list(range(number))) == [[suspect] for suspect in range(number)]


@pytest.mark.parametrize(("number", "sizes"), [(9, [3, 3, 3]), (10, [4, 4, 2]), (64, [8] * 8), (65, [9] * 7 + [2])])
def test_many_suspects_run_in_groups_of_about_the_square_root(number: int, sizes: list[int]) -> None:
    assert [len(group) for group in groups(list(range(number)))] == sizes


def test_without_suspects_no_group_runs() -> None:
    assert groups([]) == []


def test_a_group_is_always_smaller_than_its_suspects() -> None:
    for number in range(2, 2000):
        assert max(map(len, groups(list(range(number))))) < number


class Afternoon:
    """Runs jobs as the pool does: together, and after a death by the plan."""

    def __init__(self, jobs: int, poison: set[int]) -> None:
        self._poison = poison
        self.deaths = 0
        self.alone: Counter[int] = Counter()
        self.survived: list[int] = []
        self.lost: list[int] = []
        plan = deque([list(range(jobs))])
        while plan:
            plan.extendleft(reversed(self._run(plan.popleft())))

    def _run(self, group: list[int]) -> list[list[int]]:
        """Whoever has to run again."""
        if self._poison.isdisjoint(group):
            self.survived += group
            return []
        self.deaths += 1
        if len(group) > 1:
            return groups(group)
        self.alone.update(group)
        if self.alone[group[0]] < MAX_DEATHS_ALONE:
            return [group]
        self.lost += group
        return []


def test_one_poisonous_job_of_64_costs_few_deaths() -> None:
    for culprit in range(64):
        afternoon = Afternoon(64, {culprit})
        assert afternoon.deaths == 4
        assert afternoon.lost == [culprit]


@pytest.mark.parametrize("seed", range(30))
def test_every_innocent_survives_and_every_culprit_is_found(seed: int) -> None:
    dice = random.Random(seed)
    jobs = dice.choice([1, 2, 8, 9, 64, 200, 1000])
    poison = set(dice.sample(range(jobs), min(jobs, dice.choice([0, 1, 2, 5]))))
    afternoon = Afternoon(jobs, poison)
    assert set(afternoon.lost) == poison
    assert sorted(afternoon.survived) == sorted(set(range(jobs)) - poison)
    # Together once, and for each culprit at most its group, its smaller group and itself, MAX_DEATHS_ALONE times.
    assert afternoon.deaths <= 1 + len(poison) * (2 + MAX_DEATHS_ALONE)


def test_all_poisonous_jobs_are_lost_and_it_ends() -> None:
    afternoon = Afternoon(20, set(range(20)))
    assert afternoon.survived == []
    assert len(afternoon.lost) == 20
