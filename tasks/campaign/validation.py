"""Checks every row of a table without sending anything, and chooses the sample. Pure but for reading the table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import JobError
from .hosts import host_of
from .plan import Plan
from .sample import Sample, Sampler
from .tables import BadRow, Table

#: Problems that are kept with their row; all are counted.
SHOWN = 20
#: Rows between two calls of `on_rows`.
TOLD_ROWS = 1_000

_COLUMN = "Column '"
_EMPTY = " is empty in this row"


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that would fail without being sent."""

    #: From 1.
    row: int
    #: None if it is not one column's.
    column: str | None
    #: A sentence with the cure.
    message: str


@dataclass(slots=True)
class Validation:
    """What is wrong with a table's rows."""

    rows: int = 0
    invalid: int = 0
    #: Invalid rows by kind, a short text.
    kinds: Counter[str] = field(default_factory=Counter)
    first: list[Problem] = field(default_factory=list)

    def add(self, row: int, error: JobError | BadRow) -> None:
        message = error.reason if isinstance(error, BadRow) else str(error)
        column = message.removeprefix(_COLUMN).partition("'")[0] if message.startswith(_COLUMN) else None
        self.invalid += 1
        self.kinds[_kind(error, column, message)] += 1
        if len(self.first) < SHOWN:
            self.first.append(Problem(row, column, message))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        kinds = dict(self.kinds.most_common())
        return {"rows": self.rows, "invalid": self.invalid, "kinds": kinds, "first": [asdict(p) for p in self.first]}


def _kind(error: JobError | BadRow, column: str | None, message: str) -> str:
    if isinstance(error, BadRow):
        return "the row cannot be read"
    why = "empty" if _EMPTY in message else f"{error.code}{f' ({error.detail})' if error.detail else ''}"
    return why if column is None else f"column {column}: {why}"


def validate(
    plan: Plan, table: Table, sampler: Sampler, on_rows: Callable[[int], None] = lambda rows: None
) -> tuple[Validation, Sample]:
    """Check all rows. `on_rows` is told the number of rows read so far.

    Raises PlanError if the plan does not fit the table's columns, and TableError.
    """
    plan.check(table.columns)
    found = Validation()
    for number, row in enumerate(table, 1):
        found.rows = number
        if number % TOLD_ROWS == 0:
            on_rows(number)
        try:
            if isinstance(row, BadRow):
                found.add(number, row)
            else:
                sampler.add(number, _checked_host(plan, row))
        except JobError as error:
            found.add(number, error)
    return found, sampler.finish()


def _checked_host(plan: Plan, row: Mapping[str, Any]) -> str:
    plan.row_id(row)
    return host_of(plan.job(row))
