"""An output's rows beside what the campaign's state has of each. Memory stays flat."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..plan import Plan
from ..state import About, CampaignState, StoredAnswer
from ..tables import BadRow, Table


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


def output_rows(table: Table, campaign: Campaign | None, source: Table | None = None) -> Iterator[OutputRow]:
    """All rows. `source` is the input's table."""
    if campaign is None:
        for number, row in enumerate(table, start=1):
            yield OutputRow(number, values_of(row))
        return
    left_out = _Cursor(campaign.state.left_out(), lambda row: row)
    answers = _Cursor(campaign.state.answers(), lambda answer: answer.row)
    inputs = _Cursor(enumerate(source, start=1) if source is not None else (), lambda pair: pair[0])
    number = 0
    for row in table:
        number += 1
        while left_out.at(number) is not None:
            number += 1
        beside = inputs.at(number)
        yield OutputRow(number, values_of(row), answers.at(number), None if beside is None else values_of(beside[1]))


def values_of(row: Mapping[str, Any] | BadRow) -> Mapping[str, Any]:
    """A row's cells; of one that cannot be read, those that could."""
    return row.values if isinstance(row, BadRow) else row


class _Cursor:
    """Finds entries by their row in an ordered stream, for rows that are asked for in order."""

    def __init__(self, entries: Iterable[Any], row_of: Callable[[Any], int]) -> None:
        self._entries = iter(entries)
        self._row_of = row_of
        self._next = next(self._entries, None)

    def at(self, row: int) -> Any | None:
        while self._next is not None and self._row_of(self._next) < row:
            self._next = next(self._entries, None)
        return self._next if self._next is not None and self._row_of(self._next) == row else None
