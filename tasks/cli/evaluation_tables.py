"""An evaluation's numbers as tables for a terminal, or as lines of tab-separated cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..campaign.evaluation import ComparedOutputs, EvaluatedOutput, JudgedRow, LabelFigures
from ..campaign.evaluation.wording import (
    DIFFERENCE_COLUMNS,
    NAMES,
    NO_ANSWER,
    difference_cells,
    interval,
    pairs_told,
    percent,
    rows_told,
    verdict,
)
from .console import echo, echo_rows

#: Classes of a confusion matrix that fits a terminal; of more, the pairs that are mixed up most are listed.
_MATRIX_CLASSES = 10
_CONFUSIONS = 10


def show_evaluation(found: EvaluatedOutput, rows: int) -> None:
    """Print one output's numbers and its worst mistakes, `rows` at most."""
    figures, mistakes = found.figures, found.mistakes[:rows]
    echo(rows_told(figures.rows, figures.unanswered, found.without_truth))
    estimates = [(name, getattr(figures, name, None)) for name in NAMES]
    echo_rows(
        ("number", "value", "95 % interval", "rows"),
        ((NAMES[name], percent(each.value), interval(each), f"{each.rows:,}") for name, each in estimates if each),
    )
    if isinstance(figures, LabelFigures):
        _show_labels(figures)
    if mistakes:
        echo("Mistakes, the most confident first:" if mistakes[0].score is not None else "Mistakes:")
        columns = ("row", "truth", "answer", "score")
        echo_rows(columns, ((row.id, _truth(row), row.answer or "", _score(row)) for row in mistakes))


def show_comparison(found: ComparedOutputs, rows: int) -> None:
    """Print two outputs' numbers, which one is better, and the rows where they differ, `rows` at most."""
    told = found.comparison
    for line in pairs_told(told.rows, told.answered, told.only_in_a, told.only_in_b, found.without_truth):
        echo(line)
    echo_rows(DIFFERENCE_COLUMNS, (difference_cells(name, each) for name, each in told.differences.items()))
    echo(verdict(told.headline, told.differences[told.headline]))
    differing = found.differing[:rows]
    if differing:
        echo("Rows where one is right and the other is not:")
        shown = ((pair.a.id, _truth(pair.a), _answer(pair.a), _answer(pair.b)) for pair in differing)
        echo_rows(("row", "truth", "A", "B"), shown)


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
    if len(labels) <= _MATRIX_CLASSES:
        _show_matrix(figures, sorted(labels, key=lambda label: (label is None, label)))
    else:
        echo("Most frequent confusions:")
        wrong = sorted((cell for cell in figures.confusion if cell.truth != cell.answer), key=lambda cell: -cell.rows)
        cells = ((cell.truth, cell.answer or NO_ANSWER, f"{cell.rows:,}") for cell in wrong[:_CONFUSIONS])
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


def _show_matrix(figures: LabelFigures, answers: Sequence[str | None]) -> None:
    echo("Rows by truth (down) and answer (across):")
    columns = ("truth", *(NO_ANSWER if answer is None else answer for answer in answers))
    echo_rows(columns, _matrix(figures, answers))


def _matrix(figures: LabelFigures, answers: Sequence[str | None]) -> Iterator[tuple[str, ...]]:
    rows = {(cell.truth, cell.answer): cell.rows for cell in figures.confusion}
    for each in figures.classes:
        yield each.label, *(f"{rows.get((each.label, answer), 0):,}" for answer in answers)


def _truth(row: JudgedRow) -> str:
    return " | ".join(row.truths)


def _answer(row: JudgedRow) -> str:
    return NO_ANSWER if row.answer is None else row.answer


def _score(row: JudgedRow) -> str:
    return "" if row.score is None else f"{row.score:.3f}"
