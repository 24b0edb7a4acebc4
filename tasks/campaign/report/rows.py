"""An output's rows beside what the campaign's state has of each. Memory stays flat."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..plan import Plan
from ..rows import InOrder, row_digest
from ..state import About, CampaignState, StoredAnswer
from ..tables import Table, values_of


@dataclass(frozen=True)
class Campaign:
    """What the file beside an output says."""

    about: About
    plan: Plan
    state: CampaignState


@dataclass(frozen=True, slots=True)
class OutputRow:
    """A row of the output."""

    #: Of the input, from 1.
    number: int
    values: Mapping[str, Any]
    answer: StoredAnswer | None = None
    #: The row of the input, where the output does not repeat its pictures.
    source: Mapping[str, Any] | None = None


def output_rows(
    table: Table, campaign: Campaign | None, source: Table | None = None, *, chosen: Collection[int] | None = None
) -> Iterator[OutputRow]:
    """The chosen rows, by default all. `source`: the input's table; its rows are used where they ask what they asked
    then."""
    if campaign is None:
        for number, row in enumerate(table, start=1):
            if chosen is None or number in chosen:
                yield OutputRow(number, values_of(row))
        return
    columns, state = campaign.plan.needed_columns, campaign.state
    stored = state.answers() if chosen is None else state.answers_of(chosen)
    left_out = InOrder((row, True) for row in state.left_out())
    answers = InOrder((answer.row, answer) for answer in stored)
    inputs = InOrder(enumerate(source, start=1) if source is not None else ())
    number = 0
    for row in table:
        number += 1
        while left_out.at(number):
            number += 1
        if chosen is not None and number not in chosen:
            continue
        answer, cells = answers.at(number), inputs.at(number)
        is_same = cells is not None and answer is not None and row_digest(columns, cells) == answer.digest
        yield OutputRow(number, values_of(row), answer, values_of(cells) if is_same else None)
