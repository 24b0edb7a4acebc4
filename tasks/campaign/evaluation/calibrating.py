"""Fits a calibration on judged answers, and says how far confidences are off before and after.

Needs the extra `evaluate`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ...calibration import Curve, Fit, logit
from .intervals import SEED, Estimate, share
from .labels import calibration_error, score_step
from .rows import Columns, EvaluationError, Judge, JudgedRow

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Right and wrong answers that a fit needs, and those of a label that gets a curve of its own.
MIN_ROWS, MIN_CLASS_ROWS = 20, 50
#: Parts of the rows; each is calibrated by what was fitted on the others.
FOLDS = 5
#: Bounds of the logarithm of a temperature, and of an offset.
_BOUNDS = ((-3.0, 3.0), (-10.0, 10.0))


@dataclass(frozen=True, slots=True)
class CalibratedOutput:
    """A fit on all rows, and its figures on rows that it was not fitted on (cross-validated)."""

    fit: Fit
    accuracy: Estimate
    #: Expected calibration errors: the mean distance of confidence and share of right answers.
    before: Estimate
    after: Estimate
    without_truth: int

    def as_dict(self) -> dict[str, Any]:
        return {"fit": self.fit.model_dump(mode="json"), **{
            name: value for name, value in asdict(self).items() if name != "fit"
        }}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Example:
    """An answer with its confidence."""

    confidence: float
    is_right: bool
    #: The answer itself where it is a label.
    label: str | None = None


def calibrate(rows: Iterable[object], columns: Columns, *, per_class: bool, seed: int = SEED) -> CalibratedOutput:
    """Fit a calibration on an output's rows, and measure it.

    Args:
        rows: As of `evaluate`.
        columns: As `find_columns` returns them, with a score.
        per_class: Whether labels with at least MIN_CLASS_ROWS answers get curves of their own.
        seed: Of the intervals' bootstrap.

    Raises:
        EvaluationError: There is no column of confidences, or too few answers have one.
    """
    if columns.score is None:
        raise EvaluationError("--score: name the column with the answers' confidences: confidence, or score of labels.")
    judge = Judge(columns)
    examples = [_example(row, columns) for row in judge.over(rows) if row.answer is not None and row.score is not None]
    if len(examples) < MIN_ROWS:
        raise EvaluationError(
            f"Only {len(examples)} rows have a truth, an answer and a confidence: at least {MIN_ROWS} are needed."
        )
    right = sum(example.is_right for example in examples)
    return CalibratedOutput(
        fit(examples, per_class=per_class),
        share(right, len(examples), seed),
        expected_error(examples, seed),
        expected_error(_cross_validated(examples, per_class=per_class), seed),
        judge.without_truth,
    )


def fit(examples: Sequence[Example], *, per_class: bool) -> Fit:
    """Fit a curve to all examples, and with `per_class` one to those of each label that has enough."""
    classes: dict[str, Curve] = {}
    labels = Counter(example.label for example in examples) if per_class else {}
    for label, count in sorted(labels.items(), key=str):
        if label is not None and count >= MIN_CLASS_ROWS:
            classes[label] = _curve([example for example in examples if example.label == label])
    return Fit(curve=_curve(examples), classes=classes, rows=len(examples))


def expected_error(examples: Iterable[Example], seed: int = SEED) -> Estimate:
    """The expected calibration error of examples."""
    return calibration_error(Counter((score_step(example.confidence), example.is_right) for example in examples), seed)


def calibrated(examples: Iterable[Example], by: Fit) -> list[Example]:
    """The examples with calibrated confidences."""
    return [
        Example(by.calibrated(example.confidence, example.label), example.is_right, example.label)
        for example in examples
    ]


def _cross_validated(examples: Sequence[Example], *, per_class: bool) -> list[Example]:
    found: list[Example] = []
    for fold in range(FOLDS):
        others = [example for number, example in enumerate(examples) if number % FOLDS != fold]
        found += calibrated(examples[fold::FOLDS], fit(others, per_class=per_class))
    return found


def _example(row: JudgedRow, columns: Columns) -> Example:
    assert row.score is not None
    is_label = columns.kind == "labels"
    return Example(
        row.score, row.match.is_exact if is_label else row.match.is_normalised, row.answer if is_label else None
    )


def _curve(examples: Sequence[Example]) -> Curve:
    """The curve with the highest likelihood, for truths that are smoothed as in Platt scaling: without wrong answers it
    would rise without end."""
    import numpy as np
    from scipy.optimize import minimize

    logits = np.array([logit(example.confidence) for example in examples])
    is_right = np.array([example.is_right for example in examples])
    right, wrong = int(is_right.sum()), int((~is_right).sum())
    targets = np.where(is_right, (right + 1) / (right + 2), 1 / (wrong + 2))

    def loss(parameters: NDArray[np.float64]) -> float:
        scores = logits * np.exp(-parameters[0]) + parameters[1]
        # The log-loss, in a form that does not overflow.
        return float(np.mean(np.logaddexp(0.0, scores) - targets * scores))

    best = minimize(loss, np.zeros(2), method="L-BFGS-B", bounds=_BOUNDS).x
    return Curve(temperature=round(float(np.exp(best[0])), 6), offset=round(float(best[1]), 6))
