"""Tables in JSONL: one JSON object a line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice

from ..errors import TableError
from .rows import BadRow, Row
from .text import MAX_CHARS, UNREADABLE, chosen_encoding, is_readable, lines, opened_text

#: Rows from which the columns are known at first.
HEAD_ROWS = 1_000
#: More distinct keys are data rather than columns' names.
MAX_COLUMNS = 10_000

#: NaN and infinity, which JSON does not have, become null.
_DECODER = json.JSONDecoder(parse_constant=lambda name: None)
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonlTable:
    """A file with a JSON object on each line; blank lines are no rows. `columns` grows as rows name further ones."""

    count: int | None = None
    schema: None = None

    def __init__(self, path: str, *, encoding: str | None = None) -> None:
        """Raises TableError if the file is clearly not JSONL."""
        self._path = path
        self._encoding, self.notes = chosen_encoding(path, encoding)
        #: Several threads may read the table, and add to it.
        self._columns: dict[str, None] = {}
        _refuse_others(self._first_line(), path)
        for _ in islice(self, HEAD_ROWS):
            pass

    def __iter__(self) -> Iterator[Row | BadRow]:
        with opened_text(self._path, self._encoding, "\n") as text:
            for number, line in enumerate(lines(text), 1):
                if not line.isspace():
                    row = _row(line, number)
                    if isinstance(row, dict) and not row.keys() <= self._columns.keys():
                        self._learn(row)
                    yield row

    @property
    def columns(self) -> list[str]:
        return list(self._columns)

    def _learn(self, row: Row) -> None:
        self._columns.update(dict.fromkeys(row))
        if len(self._columns) > MAX_COLUMNS:
            raise TableError(
                f"{self._path} has more than {MAX_COLUMNS:,} keys: write changing names as values instead."
            )

    def _first_line(self) -> str:
        with opened_text(self._path, self._encoding, "\n") as text:
            return next((line.strip() for line in lines(text) if not line.isspace()), "")


def _row(line: str, number: int) -> Row | BadRow:
    if not is_readable(line):
        return BadRow(f"Line {number} is not in the file's encoding: save it as UTF-8.")
    if len(line) == MAX_CHARS:
        return BadRow(f"Line {number} has {MAX_CHARS:,} characters or more: send its picture by URL.")
    try:
        row = _DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        return BadRow(f"Line {number} is not JSON: {error}.")
    if not isinstance(row, dict):
        return BadRow(f"Line {number} is not a JSON object: write one, with the columns' names as keys.")
    if _ESCAPED_SURROGATE.search(line) and not _is_text(row):
        return BadRow(f"Line {number} holds half a character (\\ud800 to \\udfff): remove it.")
    return row


def _is_text(row: Row) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_others(first: str, path: str) -> None:
    if first.startswith("["):
        raise TableError(f"{path} is one JSON array, not JSONL: write each object on its own line (jq -c '.[]' FILE).")
    if first == "{":
        raise TableError(f"{path} is one JSON object over several lines, not JSONL: put it on one line (jq -c . FILE).")
    if first and not first.startswith("{") and UNREADABLE not in first:
        raise TableError(f'{path} is not JSONL: each line is an object, such as {{"url": "https://..."}}.')
