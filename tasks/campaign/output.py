"""Writes a campaign's output: the input's rows in order, each with the columns of its answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import IdeficsError
from .plan import Plan
from .rows import InOrder
from .state import CampaignState, StoredAnswer
from .tables import BadRow, Table, open_writer


class NotRun(IdeficsError):
    """The campaign was stopped before this row had an answer: run the same command again to go on."""

    code = "not_run"
    retryable = True
    http_status = 503
    public = {"": "This was not done: try again later."}

    def __init__(self) -> None:
        super().__init__(self.__doc__)


def write_output(path: str, table: Table, plan: Plan, state: CampaignState) -> None:
    """Replace the output, atomically. Raises TableError."""
    remove_unfinished(path)
    answers = InOrder((answer.row, answer) for answer in state.answers())
    left_out = InOrder((row, True) for row in state.left_out())
    # A row of JSON may bring a column of an answer's name after the plan was checked.
    columns = list(dict.fromkeys([*table.columns, *plan.outcome_columns]))
    not_run = plan.outcome(NotRun())
    with open_writer(path, columns, table.schema, plan.outcome_types) as writer:
        for number, cells in enumerate(table, 1):
            answer = answers.at(number)
            if not left_out.at(number):
                writer.write({**_readable(cells), **(not_run if answer is None else _outcome(plan, answer))})


def _outcome(plan: Plan, answer: StoredAnswer) -> dict[str, Any]:
    return plan.outcome(answer.outcome)


def _readable(cells: Mapping[str, Any] | BadRow) -> Mapping[str, Any]:
    return cells.values if isinstance(cells, BadRow) else cells


def remove_unfinished(path: str) -> None:
    """Remove what a run that was killed while it wrote the output has left beside it."""
    if "://" in path:
        return
    output = Path(path).absolute()
    for part in output.parent.glob(f".{output.name[:100]}.*.part"):
        part.unlink(missing_ok=True)
