"""Texts over a row's columns: `What colour is {name}?`. Pure.

The syntax is that of str.format, with whole column names only: no attributes, indices, conversions or format
specifications. `{{` and `}}` are braces.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import InvalidRequest
from .errors import PlanError

_FORMATTER = string.Formatter()


@dataclass(frozen=True)
class Template:
    """A text with the columns that it takes in."""

    #: Each literal text with the column after it; None after the last.
    parts: tuple[tuple[str, str | None], ...]

    @cached_property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(column for _, column in self.parts if column is not None))

    @cached_property
    def sole_column(self) -> str | None:
        """The column, if the template is that column alone."""
        return self.parts[0][1] if len(self.parts) == 1 and not self.parts[0][0] else None

    def fill(self, row: Mapping[str, Any]) -> str:
        """The text for a row. Raises InvalidRequest naming a column that the row leaves empty."""
        return "".join(text if column is None else text + _cell(row, column) for text, column in self.parts)


def template(text: str, option: str) -> Template:
    """Parse a template. Raises PlanError, naming `option`."""
    try:
        found = list(_FORMATTER.parse(text))
    except ValueError as error:
        raise PlanError(f"{option}: {error}. Columns are written {{name}}; a brace itself is {{{{ or }}}}.") from None
    if any(column is not None and (form or conversion or not column) for _, column, form, conversion in found):
        raise PlanError(f"{option}: only whole column names stand in braces, as in {{name}}; a brace itself is {{{{.")
    return Template(tuple((literal, column) for literal, column, _, _ in found))


def _cell(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if is_empty(value):
        raise empty(column)
    return text_of(value, column)


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing: null, or blanks only."""
    return value is None or (isinstance(value, str) and not value.strip())


def empty(column: str) -> InvalidRequest:
    return InvalidRequest(f"Column {column!r} is empty in this row: fill it in, or leave the row out.")


def text_of(value: Any, column: str) -> str:
    """A cell as text; nested values as JSON. Raises InvalidRequest for bytes."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        raise InvalidRequest(f"Column {column!r} holds bytes where a text is needed: use another column.")
    if isinstance(value, bool | dict | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
