"""How good labels are: accuracy, precision and recall by class, confusion, and whether the probabilities hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, cast

from .intervals import SEED, Estimate, estimate, share
from .rows import JudgedRow

if TYPE_CHECKING:
    from .intervals import Counts, Values

#: Of the calibration curve, equally wide.
BINS = 10
#: Probabilities are rounded to a thousandth: the calibration error is off by half of one at most.
_STEPS = 1_000


@dataclass(frozen=True, slots=True)
class ClassFigures:
    """One class of the truth. A share is None where nothing defines it: no row was given this label."""

    label: str
    precision: float | None
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """The answers whose probability lies in (low, high]."""

    low: float
    high: float
    rows: int
    #: Mean probability, and the share that is right.
    score: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class ConfusionCell:
    """Rows with this truth and this answer."""

    truth: str
    answer: str | None
    rows: int


@dataclass(slots=True)
class LabelTally:
    """What the numbers are computed from, counted row by row: pairs of truth and answer, and probabilities."""

    #: (truth, answer): rows. The answer is None if there is none.
    pairs: Counter[tuple[str, str | None]] = field(default_factory=Counter)
    #: (probability in steps, is right): rows.
    scores: Counter[tuple[int, bool]] = field(default_factory=Counter)

    def add(self, row: JudgedRow) -> None:
        """Count a row. Of several truths the one that was answered counts, or else the first."""
        truth = row.answer if row.match.is_exact and row.answer is not None else row.truths[0]
        self.pairs[truth, row.answer] += 1
        if row.score is not None:
            self.scores[score_step(row.score), row.match.is_exact] += 1


@dataclass(frozen=True, slots=True)
class LabelFigures:
    """The numbers of a table of labels."""

    rows: int
    unanswered: int
    #: Over all rows; one without an answer is wrong.
    accuracy: Estimate
    #: Over the rows with an answer.
    accuracy_answered: Estimate
    #: The mean of the truth's classes, over all rows.
    macro_f1: Estimate
    #: None if no answer has a probability.
    calibration_error: Estimate | None
    classes: list[ClassFigures]
    #: The cells of the confusion matrix that are not 0, by truth; an answer is None where there is none.
    confusion: list[ConfusionCell]
    calibration: list[CalibrationBin]

    def as_dict(self) -> dict[str, Any]:
        return {"kind": "labels", **asdict(self)}


def label_figures(tally: LabelTally, seed: int = SEED) -> LabelFigures:
    """The numbers of the rows that were counted, at least one."""
    import numpy as np

    pairs = sorted(tally.pairs, key=lambda pair: (pair[0], pair[1] is None, pair[1] or ""))
    counts, sums = np.array([tally.pairs[pair] for pair in pairs]), ClassSums(pairs)
    rows = int(counts.sum())
    unanswered = sum(count for (_, answer), count in tally.pairs.items() if answer is None)
    right = sum(count for (truth, answer), count in tally.pairs.items() if truth == answer)
    return LabelFigures(
        rows=rows,
        unanswered=unanswered,
        accuracy=share(right, rows, seed),
        accuracy_answered=share(right, rows - unanswered, seed),
        macro_f1=estimate(counts, sums.macro_f1, seed),
        calibration_error=calibration_error(tally.scores, seed) if tally.scores else None,
        classes=sums.figures(counts),
        confusion=[ConfusionCell(*pair, count) for pair, count in zip(pairs, counts.tolist(), strict=True)],
        calibration=_calibration(tally.scores),
    )


class ClassSums:
    """Adds up counts of pairs of truth and answer, shaped (resamples, pairs), to (resamples, classes of the truth)."""

    def __init__(self, pairs: Sequence[tuple[str, str | None]]) -> None:
        self.labels = sorted({truth for truth, _ in pairs})
        self._codes = {label: code for code, label in enumerate(self.labels)}
        self._right = self._adding([truth if truth == answer else None for truth, answer in pairs])
        self._truths = self._adding([truth for truth, _ in pairs])
        self._answers = self._adding([answer for _, answer in pairs])

    def _adding(self, labels: Sequence[str | None]) -> Any:
        """A matrix that adds up cells by these classes; what is no class of the truth is left out."""
        import numpy as np
        from scipy.sparse import csr_array

        cells = [cell for cell, label in enumerate(labels) if label in self._codes]
        codes = [self._codes[label] for label in labels if label in self._codes]
        ones = np.ones(len(cells), np.int64)
        return csr_array((ones, (cells, codes)), shape=(len(labels), len(self.labels)))

    def right(self, counts: Counts) -> Counts:
        """Rows whose answer is the truth."""
        return cast("Counts", counts @ self._right)

    def truths(self, counts: Counts) -> Counts:
        """Rows with this truth."""
        return cast("Counts", counts @ self._truths)

    def answers(self, counts: Counts) -> Counts:
        """Rows with this answer."""
        return cast("Counts", counts @ self._answers)

    def macro_f1(self, counts: Counts) -> Values:
        """The mean F1 of the classes that each resample holds."""
        import numpy as np

        truths = self.truths(counts)
        f1 = 2 * self.right(counts) / np.maximum(truths + self.answers(counts), 1)
        mean: Values = f1.sum(axis=1, where=truths > 0) / np.maximum((truths > 0).sum(axis=1), 1)
        return mean

    def figures(self, counts: Counts) -> list[ClassFigures]:
        """Each class's numbers, from one set of counts."""
        row = counts[None, :]
        columns = (each(row)[0].tolist() for each in (self.right, self.truths, self.answers))
        return [
            ClassFigures(label, right / given if given else None, right / rows, 2 * right / (rows + given), rows)
            for label, right, rows, given in zip(self.labels, *columns, strict=True)
        ]


def score_step(score: float) -> int:
    """A probability in steps."""
    return round(score * _STEPS)


def _bin(step: int) -> int:
    """The bin of a probability in steps: 0 for (0, 0.1] and for 0 itself."""
    return max(0, (step * BINS - 1) // _STEPS)


def _calibration(scores: Counter[tuple[int, bool]]) -> list[CalibrationBin]:
    rows: Counter[int] = Counter()
    right: Counter[int] = Counter()
    total: Counter[int] = Counter()
    for (step, is_right), count in scores.items():
        rows[_bin(step)] += count
        right[_bin(step)] += count * is_right
        total[_bin(step)] += count * step
    return [
        CalibrationBin(
            each / BINS, (each + 1) / BINS, rows[each], total[each] / _STEPS / rows[each], right[each] / rows[each]
        )
        for each in sorted(rows)
    ]


def calibration_error(scores: Counter[tuple[int, bool]], seed: int) -> Estimate:
    """The mean distance between probability and accuracy over the bins, weighted by their rows (ECE)."""
    import numpy as np
    from scipy.sparse import csr_array

    cells = sorted(scores)
    bins = [_bin(step) for step, _ in cells]
    # Of each cell the row's excess of accuracy over probability: a bin's sum is its distance times its rows.
    excess = [is_right - step / _STEPS for step, is_right in cells]
    by_bin = csr_array((excess, (range(len(cells)), bins)), shape=(len(cells), BINS))

    def statistic(counts: Counts) -> Values:
        error: Values = np.abs(counts @ by_bin).sum(axis=1) / counts.sum(axis=1)
        return error

    return estimate(np.array([scores[cell] for cell in cells]), statistic, seed)
