"""Writes a campaign's output: the input's rows in order, each with the columns of its answer."""

from __future__ import annotations

from pathlib import Path

from ..errors import IdeficsError
from .plan import Plan
from .rows import InOrder
from .state import CampaignState
from .tables import Table, open_writer, values_of


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
                writer.write({**values_of(cells), **(not_run if answer is None else plan.outcome(answer.outcome))})


def remove_unfinished(path: str) -> None:
    """Remove what a run that was killed while it wrote the output has left beside it."""
    if "://" in path:
        return
    output = Path(path).absolute()
    for part in output.parent.glob(f".{output.name[:100]}.*.part"):
        part.unlink(missing_ok=True)
