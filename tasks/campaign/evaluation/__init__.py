"""Is a campaign's output any good? Its answers against the truth, and two outputs against each other.

Needs the extra `evaluate`. The numbers are computed from counts, so that memory depends on the number of classes, not
on that of rows; only a comparison holds B's rows.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .comparison import Comparison, ComparisonTally, Difference, Join, Pair
from .intervals import SEED, Estimate
from .labels import LabelFigures, LabelTally, label_figures
from .rows import Columns, EvaluationError, Judge, JudgedRow, Kind, find_columns
from .texts import TextFigures, TextTally, text_figures

__all__ = [
    "Columns",
    "ComparedOutputs",
    "Comparison",
    "Difference",
    "Estimate",
    "EvaluatedOutput",
    "EvaluationError",
    "JudgedRow",
    "Kind",
    "LabelFigures",
    "Pair",
    "TextFigures",
    "compare",
    "evaluate",
    "find_columns",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class EvaluatedOutput:
    """One output's numbers, and its worst mistakes: the wrong answers with the highest probability come first."""

    figures: LabelFigures | TextFigures
    without_truth: int
    mistakes: list[JudgedRow]
    #: Wrong answers in all, of which `mistakes` are the worst.
    wrong: int

    def as_dict(self) -> dict[str, Any]:
        return {"without_truth": self.without_truth, **self.figures.as_dict()}


@dataclass(frozen=True, slots=True)
class ComparedOutputs:
    """Two outputs' numbers, and the first rows where one of them is right and the other is not."""

    comparison: Comparison
    without_truth: int
    differing: list[Pair]

    def as_dict(self) -> dict[str, Any]:
        return {"without_truth": self.without_truth, **self.comparison.as_dict()}


@dataclass(slots=True)
class _Mistakes:
    """The worst of the wrong answers: by probability, then the first ones."""

    most: int
    wrong: int = 0
    _heap: list[tuple[float, int, JudgedRow]] = field(default_factory=list)

    def add(self, row: JudgedRow) -> None:
        if row.answer is None or row.match.is_normalised:
            return
        self.wrong += 1
        entry = (row.score or 0.0, -row.number, row)
        if len(self._heap) < self.most:
            heapq.heappush(self._heap, entry)
        elif self.most:
            heapq.heappushpop(self._heap, entry)

    def worst_first(self) -> list[JudgedRow]:
        return [row for _, _, row in sorted(self._heap, reverse=True, key=lambda entry: entry[:2])]


def evaluate(rows: Iterable[object], columns: Columns, *, keep: int = 20, seed: int = SEED) -> EvaluatedOutput:
    """The numbers of one output.

    Args:
        rows: The table's rows as dictionaries; anything else counts as a row that could not be read.
        columns: As `find_columns` returns them.
        keep: Mistakes to keep at most.
        seed: Of the bootstrap: the same seed gives the same intervals.

    Raises:
        EvaluationError: No row has a truth, or a score is no probability.
    """
    judge, mistakes = Judge(columns), _Mistakes(keep)
    tally: LabelTally | TextTally = LabelTally() if columns.kind == "labels" else TextTally()
    for row in judge.over(rows):
        tally.add(row)
        mistakes.add(row)
    _check_truths(judge, columns)
    figures = label_figures(tally, seed) if isinstance(tally, LabelTally) else text_figures(tally, seed)
    return EvaluatedOutput(figures, judge.without_truth, mistakes.worst_first(), mistakes.wrong)


def compare(
    a: Iterable[object], b: Iterable[object], of_a: Columns, of_b: Columns, *, keep: int = 20, seed: int = SEED
) -> ComparedOutputs:
    """The numbers of two outputs of the same input, joined by their ids if the columns name them, otherwise by row.

    Args:
        a: A's rows, as of `evaluate`.
        b: B's rows. They are held in memory.
        of_a: The columns of A.
        of_b: The columns of B.
        keep: Differing rows to keep at most, the first ones.
        seed: Of the bootstrap.

    Raises:
        EvaluationError: No row is in both, ids are not unique, or the truths differ.
    """
    if of_a.kind != of_b.kind:
        raise EvaluationError(f"A holds {of_a.kind} and B {of_b.kind}: name the columns with --answer, or use --as.")
    join, judge_a, judge_b = Join("id" if of_a.id else "row"), Judge(of_a), Judge(of_b)
    tally, differing = ComparisonTally(), list[Pair]()
    for pair in join.over(judge_a.over(a), judge_b.over(b)):
        tally.add(pair)
        if pair.differs and len(differing) < keep:
            differing.append(pair)
    for judge, columns in ((judge_a, of_a), (judge_b, of_b)):
        _check_truths(judge, columns)
    comparison = tally.comparison(of_a.kind, join, seed)
    if comparison.rows == 0:
        raise EvaluationError("No row of A is in B: name the column of the rows' ids with --id.")
    return ComparedOutputs(comparison, judge_a.without_truth, differing)


def _check_truths(judge: Judge, columns: Columns) -> None:
    if judge.read == judge.without_truth:
        raise EvaluationError(f"--truth: no row has a value in the column {columns.truth!r}.")
