"""Two outputs over the same rows: which one is better, and is it more than chance?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from .intervals import SEED, Estimate, estimate, share
from .matching import Match
from .rows import EvaluationError, JudgedRow, Kind

if TYPE_CHECKING:
    from .intervals import Counts, Values

#: B is called better or worse if the test's p-value is below.
SIGNIFICANCE = 0.05


@dataclass(frozen=True, slots=True)
class Pair:
    """One row of the input, in both outputs."""

    a: JudgedRow
    b: JudgedRow

    @property
    def differs(self) -> bool:
        """Whether one of the two answers is right and the other is not."""
        return self.a.match.is_normalised != self.b.match.is_normalised


class Join:
    """Pairs the rows of two outputs; counts the rows that only one of them has. Holds B's rows in memory."""

    def __init__(self, by: Literal["id", "row"]) -> None:
        self._by = by
        self.only_in_a = 0
        self.only_in_b = 0

    def over(self, a: Iterable[JudgedRow], b: Iterable[JudgedRow]) -> Iterator[Pair]:
        """The pairs, in the order of A.

        Raises:
            EvaluationError: An id stands in several rows, or a row has other truths in B than in A.
        """
        others = dict(self._keyed(b, "B"))
        for key, row in self._keyed(a, "A"):
            other = others.pop(key, None)
            if other is None:
                self.only_in_a += 1
            elif other.truths != row.truths:
                raise EvaluationError(self._other_truth(row, other))
            else:
                yield Pair(row, other)
        self.only_in_b = len(others)

    def _keyed(self, rows: Iterable[JudgedRow], table: str) -> Iterator[tuple[str | int, JudgedRow]]:
        seen: set[str | int] = set()
        for row in rows:
            key = row.id if self._by == "id" else row.number
            if key in seen:
                raise EvaluationError(f"{table}: the id {row.id[:100]!r} stands in several rows.")
            seen.add(key)
            yield key, row

    def _other_truth(self, a: JudgedRow, b: JudgedRow) -> str:
        cure = "" if self._by == "id" else " If the rows are in another order, join them with --id COLUMN."
        told = f"the truth is {a.truths[0][:50]!r} in A and {b.truths[0][:50]!r} in B."
        return f"Row {a.number} of A is row {b.number} of B, but {told}{cure}"


@dataclass(frozen=True, slots=True)
class Difference:
    """A share of right rows in A and in B, and how they differ."""

    a: Estimate
    b: Estimate
    #: B less A, by the paired bootstrap.
    difference: Estimate
    both_right: int
    only_a_right: int
    only_b_right: int
    neither_right: int
    #: Of McNemar's exact test: how probable so uneven a split of the rows with one right answer is by chance.
    p_value: float

    @property
    def better(self) -> Literal["a", "b"] | None:
        """The better one; None if no difference is told."""
        if self.p_value >= SIGNIFICANCE:
            return None
        return "b" if self.only_b_right > self.only_a_right else "a"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "better": self.better}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two outputs, row by row."""

    kind: Kind
    #: Rows that both have.
    rows: int
    #: Of them, those that both have answered.
    answered: int
    only_in_a: int
    only_in_b: int
    #: Rows whose answers differ, right or wrong.
    other_answers: int
    #: By the number's name, as of one output; the `_answered` ones are over the rows that both have answered.
    differences: dict[str, Difference]

    @property
    def headline(self) -> str:
        """The number that says which one is better: over all rows, and of texts the normalised match."""
        return "accuracy" if self.kind == "labels" else "normalised"

    def as_dict(self) -> dict[str, Any]:
        told = {name: difference.as_dict() for name, difference in self.differences.items()}
        return {**asdict(self), "differences": told}


class ComparisonTally:
    """Pairs counted by how they match."""

    def __init__(self) -> None:
        self._matches: Counter[tuple[Match, Match]] = Counter()
        self._other_answers = 0

    def add(self, pair: Pair) -> None:
        self._matches[pair.a.match, pair.b.match] += 1
        self._other_answers += pair.a.answer != pair.b.answer

    def comparison(self, kind: Kind, join: Join, seed: int = SEED) -> Comparison:
        """The numbers of the pairs that were counted."""
        answered = Counter({(a, b): n for (a, b), n in self._matches.items() if a.is_answered and b.is_answered})
        names: dict[str, Callable[[Match], bool]] = {"accuracy": lambda match: match.is_exact}
        if kind == "text":
            names = {"exact": names["accuracy"], "normalised": lambda match: match.is_normalised}
        differences = {}
        for name, is_right in names.items():
            differences[name] = _difference(self._matches, is_right, seed)
            differences[f"{name}_answered"] = _difference(answered, is_right, seed)
        return Comparison(
            kind=kind,
            rows=self._matches.total(),
            answered=answered.total(),
            only_in_a=join.only_in_a,
            only_in_b=join.only_in_b,
            other_answers=self._other_answers,
            differences=differences,
        )


def _difference(matches: Counter[tuple[Match, Match]], is_right: Callable[[Match], bool], seed: int) -> Difference:
    import numpy as np

    cells: Counter[tuple[bool, bool]] = Counter()
    for (a, b), count in matches.items():
        cells[is_right(a), is_right(b)] += count
    both, only_a, only_b = cells[True, True], cells[True, False], cells[False, True]
    rows = cells.total()
    return Difference(
        a=share(both + only_a, rows, seed),
        b=share(both + only_b, rows, seed),
        difference=estimate(np.array([only_a, only_b, rows - only_a - only_b]), _gain, seed),
        both_right=both,
        only_a_right=only_a,
        only_b_right=only_b,
        neither_right=cells[False, False],
        p_value=mcnemar(only_a, only_b),
    )


def _gain(counts: Counts) -> Values:
    """B's share of right rows less A's, from counts of rows that only A, only B, and both or neither have right."""
    gain: Values = (counts[:, 1] - counts[:, 0]) / counts.sum(axis=1)
    return gain


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p-value of McNemar's test: as likely as not, each row that differs is A's or B's."""
    from scipy.stats import binomtest

    if only_a + only_b == 0:
        return 1.0
    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue)
