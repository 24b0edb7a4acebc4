"""An evaluation's numbers as tables for a terminal, or as lines of tab-separated cells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..campaign.evaluation import ComparedOutputs, Difference, Estimate, EvaluatedOutput, JudgedRow, LabelFigures
from .console import echo, echo_rows

#: Classes of a confusion matrix that fits a terminal; of more, the pairs that are mixed up most are listed.
_MATRIX_CLASSES = 10
_CONFUSIONS = 10
_NAMES = {
    "accuracy": "accuracy",
    "accuracy_answered": "accuracy, answered rows only",
    "macro_f1": "macro F1",
    "calibration_error": "calibration error (ECE)",
    "exact": "exact match",
    "exact_answered": "exact match, answered rows only",
    "normalised": "normalised match",
    "normalised_answered": "normalised match, answered rows only",
}
#: Smaller p-values are shown as smaller than this.
_LEAST_P = 0.001
_NO_ANSWER = "(no answer)"


def show_evaluation(found: EvaluatedOutput) -> None:
    """Print one output's numbers and its worst mistakes."""
    figures = found.figures
    echo(f"{figures.rows:,} rows with a truth{_without(found.without_truth)}, {_unanswered(figures.unanswered)}.")
    estimates = {name: getattr(figures, name, None) for name in _NAMES}
    echo_rows(("number", "value", "95 % interval", "rows"), _estimates(estimates))
    if isinstance(figures, LabelFigures):
        _show_labels(figures)
    if found.mistakes:
        echo("Mistakes, the most confident first:" if found.mistakes[0].score is not None else "Mistakes:")
        columns = ("row", "truth", "answer", "score")
        echo_rows(columns, ((row.id, _truth(row), row.answer or "", _score(row)) for row in found.mistakes))


def show_comparison(found: ComparedOutputs) -> None:
    """Print two outputs' numbers, which one is better, and the rows where they differ."""
    comparison = found.comparison
    echo(f"{comparison.rows:,} rows with a truth are in both{_without(found.without_truth)}.")
    echo(f"{comparison.answered:,} of them are answered in both; a row without an answer counts as wrong.")
    if comparison.only_in_a or comparison.only_in_b:
        echo(f"{comparison.only_in_a:,} more rows are only in A, {comparison.only_in_b:,} only in B.")
    echo_rows(
        ("number", "A", "B", "B - A", "95 % interval", "p", "only A right", "only B right"),
        (_difference(name, each) for name, each in comparison.differences.items()),
    )
    echo(verdict(_NAMES[comparison.headline], comparison.differences[comparison.headline]))
    if found.differing:
        echo("Rows where one is right and the other is not:")
        rows = ((pair.a.id, _truth(pair.a), _answer(pair.a), _answer(pair.b)) for pair in found.differing)
        echo_rows(("row", "truth", "A", "B"), rows)


def verdict(name: str, difference: Difference) -> str:
    """Which is better by this number, by how much, and how sure that is."""
    gain = difference.difference
    told = f"B less A in {name}: {_points(gain.value)} points"
    if gain.low is not None and gain.high is not None:
        told += f" (95 %: {_points(gain.low)} to {_points(gain.high)})"
    chance = _p(difference.p_value) if difference.p_value < _LEAST_P else f"= {_p(difference.p_value)}"
    better = f"{difference.better.upper()} is better" if difference.better else "No difference can be told"
    return f"{told}, p {chance} by McNemar's exact test. {better}."


def _show_labels(figures: LabelFigures) -> None:
    echo("By class:")
    echo_rows(
        ("class", "precision", "recall", "F1", "rows"),
        (
            (each.label, percent(each.precision), percent(each.recall), percent(each.f1), f"{each.support:,}")
            for each in figures.classes
        ),
    )
    labels = {cell.answer for cell in figures.confusion} | {each.label for each in figures.classes}
    answers = sorted(labels, key=lambda label: (label is None, label))
    if len(figures.classes) <= _MATRIX_CLASSES and len(answers) <= _MATRIX_CLASSES:
        echo("Rows by truth (down) and answer (across):")
        echo_rows(
            ("truth", *(_NO_ANSWER if answer is None else answer for answer in answers)), _matrix(figures, answers)
        )
    else:
        echo("Most frequent confusions:")
        wrong = sorted((cell for cell in figures.confusion if cell.truth != cell.answer), key=lambda cell: -cell.rows)
        cells = ((cell.truth, cell.answer or _NO_ANSWER, f"{cell.rows:,}") for cell in wrong[:_CONFUSIONS])
        echo_rows(("truth", "answer", "rows"), cells)
    if figures.calibration:
        echo("Calibration:")
        echo_rows(
            ("probability", "mean", "right", "rows"),
            (
                (f"{each.low:.1f} to {each.high:.1f}", percent(each.score), percent(each.accuracy), f"{each.rows:,}")
                for each in figures.calibration
            ),
        )


def _matrix(figures: LabelFigures, answers: Sequence[str | None]) -> Iterator[tuple[str, ...]]:
    rows = {(cell.truth, cell.answer): cell.rows for cell in figures.confusion}
    for each in figures.classes:
        yield each.label, *(f"{rows.get((each.label, answer), 0):,}" for answer in answers)


def _estimates(estimates: dict[str, Estimate | None]) -> Iterable[tuple[str, ...]]:
    for name, each in estimates.items():
        if each is not None:
            yield _NAMES[name], percent(each.value), interval(each), f"{each.rows:,}"


def _difference(name: str, each: Difference) -> tuple[str, ...]:
    gain = each.difference
    between = "-" if gain.low is None or gain.high is None else f"{_points(gain.low)} to {_points(gain.high)}"
    return (
        _NAMES[name], percent(each.a.value), percent(each.b.value), _points(gain.value), between, _p(each.p_value),
        f"{each.only_a_right:,}", f"{each.only_b_right:,}",
    )  # fmt: skip


def percent(value: float | None) -> str:
    """A share from 0 to 1 in per cent."""
    return "-" if value is None else f"{100 * value:.1f} %"


def interval(each: Estimate) -> str:
    """An estimate's interval in per cent."""
    if each.low is None or each.high is None:
        return "-"
    return f"{100 * each.low:.1f} to {100 * each.high:.1f} %"


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= _LEAST_P else f"< {_LEAST_P}"


def _without(rows: int) -> str:
    return f" ({rows:,} without one are left out)" if rows else ""


def _unanswered(rows: int) -> str:
    return f"{rows:,} of them not answered, which counts as wrong" if rows else "all answered"


def _truth(row: JudgedRow) -> str:
    return " | ".join(row.truths)


def _answer(row: JudgedRow) -> str:
    return _NO_ANSWER if row.answer is None else row.answer


def _score(row: JudgedRow) -> str:
    return "" if row.score is None else f"{row.score:.3f}"
