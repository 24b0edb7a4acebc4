"""The rows of a campaign's output as they are judged: an answer beside its truths. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import CampaignError, nearest
from .matching import Match, accepted, as_text, match_label, match_text

#: How answers are judged: `labels` of classify, with classes and probabilities, or free `text`.
Kind = Literal["labels", "text"]


class EvaluationError(CampaignError):
    """The table cannot be evaluated as asked: correct what the message names."""

    code = "evaluation"


@dataclass(frozen=True, slots=True)
class Columns:
    """The names of a table's columns that an evaluation reads; None for a column that it does without."""

    truth: str
    answer: str = ""
    kind: Kind = "text"
    score: str | None = None
    error: str | None = None
    id: str | None = None
    image: str | None = None
    #: Between a cell's accepted truths; None if a cell is one truth or a JSON list.
    separator: str | None = None


@dataclass(frozen=True, slots=True)
class JudgedRow:
    """A row with a truth."""

    #: From 1, as the table's rows are counted.
    number: int
    id: str
    truths: tuple[str, ...]
    answer: str | None
    #: The probability of the answer, 0 to 1.
    score: float | None
    #: The error's code if the row has no answer.
    code: str
    #: The cell with the picture, as the table has it.
    image: Any
    match: Match


def find_columns(names: Sequence[str], wanted: Columns, kind: Kind | None = None) -> Columns:
    """The columns of a table that an evaluation reads: those `wanted`, and a campaign's own for what it leaves open.

    The answer is `label`, or `text` where there is no `label`; its probability is `score`. Answers with a probability
    are labels, unless `kind` says otherwise.

    Raises:
        EvaluationError: A column is missing; the message has the nearest names.
    """
    for name, option in ((wanted.truth, "--truth"), (wanted.answer, "--answer"), (wanted.score, "--score"),
                         (wanted.id, "--id"), (wanted.image, "--image")):  # fmt: skip
        if name and name not in names:
            raise EvaluationError(f"{option}: there is no column {name[:100]!r}.{nearest(name, names)}")
    answer = wanted.answer or next((name for name in ("label", "text") if name in names), "")
    if not answer:
        raise EvaluationError(
            f"No column holds the answers: neither label nor text is there. Name it with --answer.{nearest('', names)}"
        )
    score = wanted.score or ("score" if "score" in names and kind != "text" else None)
    return replace(
        wanted,
        answer=answer,
        kind=kind or ("labels" if score or answer == "label" else "text"),
        score=score,
        error=wanted.error or ("error_code" if "error_code" in names else None),
    )


class Judge:
    """Judges a table's rows; counts those that it leaves out."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._match = match_label if columns.kind == "labels" else match_text
        #: Rows that were read, and how many of them have no truth or cannot be read.
        self.read = 0
        self.without_truth = 0

    def over(self, rows: Iterable[object]) -> Iterator[JudgedRow]:
        """The rows that have a truth, in order. Raises EvaluationError for a score that is no probability."""
        for row in rows:
            self.read += 1
            judged = self._judged(row) if isinstance(row, Mapping) else None
            if judged is None:
                self.without_truth += 1
            else:
                yield judged

    def _judged(self, row: Mapping[str, Any]) -> JudgedRow | None:
        columns = self._columns
        truths = accepted(row.get(columns.truth), columns.separator)
        if not truths:
            return None
        answer = _answer(row, columns)
        has_score = columns.score is not None and answer is not None
        return JudgedRow(
            number=self.read,
            id=as_text(row.get(columns.id)) if columns.id else str(self.read),
            truths=truths,
            answer=answer,
            score=_score(row.get(columns.score or ""), self.read) if has_score else None,
            code=_code(row, columns),
            image=row.get(columns.image) if columns.image else None,
            match=self._match(answer, truths),
        )


def _code(row: Mapping[str, Any], columns: Columns) -> str:
    return as_text(row.get(columns.error)) if columns.error else ""


def _answer(row: Mapping[str, Any], columns: Columns) -> str | None:
    """None if the row failed or was not run. An empty text is an answer if the row has a finish reason."""
    answer = as_text(row.get(columns.answer))
    if _code(row, columns):
        return None
    is_said_empty = columns.kind == "text" and columns.error is not None and bool(row.get("finish_reason"))
    return answer if answer or is_said_empty else None


def _score(value: Any, number: int) -> float | None:
    if not as_text(value):
        return None
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = -1.0
    if not 0 <= score <= 1:
        raise EvaluationError(f"Row {number}: the score {str(value)[:50]!r} is no probability from 0 to 1.")
    return score
