"""Tables in CSV and TSV (RFC 4180), as they come: any encoding, several delimiters, broken lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from ..errors import TableError
from .csv_records import Record, nulls, records
from .rows import BadRow, Row
from .text import chosen_encoding, is_readable, lines, opened_text, repaired

_OTHER_DELIMITERS = ";\t|"
_URLS = ("http://", "https://", "data:image/")
#: Begins Excel's line before the header.
_TOLD = "sep="


class CsvTable:
    """A CSV or TSV file with the names of its columns in the first line.

    All values are texts, or None for an empty field without quotes. Blank lines are no rows. A row with more or fewer
    fields than the header, or with bytes that are nothing in the file's encoding, is a BadRow.
    """

    count: int | None = None
    schema: None = None

    def __init__(
        self, path: str, *, encoding: str | None = None, delimiter: str | None = None, is_tsv: bool = False
    ) -> None:
        """Raises TableError if the file has no header with distinct names."""
        self._path = path
        self._encoding, self.notes = chosen_encoding(path, encoding)
        told, first = self._first_lines()
        self._has_told = bool(told)
        self._delimiter = delimiter or told or ("\t" if is_tsv else _recognized(first, path))
        if len(self._delimiter) != 1 or self._delimiter in '"\r\n':
            raise TableError(f"A delimiter is one character, other than a quote: {self._delimiter!r} is not.")
        if not delimiter and not is_tsv and self._delimiter != ",":
            self.notes = [*self.notes, f"Its columns are separated by {self._delimiter!r}."]
        self.columns = _header(next(self._records(), None), path)

    def __iter__(self) -> Iterator[Row | BadRow]:
        found = self._records()
        next(found)
        for record in found:
            # Of several columns, a line of blanks is a blank line.
            if len(record.cells) > 1 or record.fault or len(self.columns) == 1 or record.text.strip():
                yield self._row(record)

    def _row(self, record: Record) -> Row | BadRow:
        cells: Sequence[str | None] = record.cells
        if "" in cells:
            cells = [None if is_null else cell for cell, is_null in zip(cells, nulls(record), strict=True)]
        if len(cells) == len(self.columns) and is_readable(record.text):
            return dict(zip(self.columns, cells, strict=True))
        values = {name: cell and repaired(cell) for name, cell in zip(self.columns, cells, strict=False)}
        return BadRow(f"Line {record.line} {record.fault or self._fault(record)}", values)

    def _fault(self, record: Record) -> str:
        if not is_readable(record.text):
            return f"is not {self._encoding.upper()}: name the encoding with --encoding, or save the file as UTF-8."
        has, needs = len(record.cells), len(self.columns)
        return f"has {has} fields, and the header {needs}: put quotes around a field with {self._delimiter!r} in it."

    def _records(self) -> Iterator[Record]:
        with opened_text(self._path, self._encoding, "") as text:
            source = lines(text)
            if self._has_told:
                next(source)
            yield from records(source, self._delimiter)

    def _first_lines(self) -> tuple[str, str]:
        """The delimiter that Excel's first line tells, or else the header's first line."""
        with opened_text(self._path, self._encoding, "") as text:
            found = lines(text)
            first = next(found, "")
            told = first.rstrip("\r\n").removeprefix(_TOLD)
            if first.startswith(_TOLD) and len(told) == 1:
                return told, ""
            return "", next((line for line in chain([first], found) if line.strip()), "")


def _recognized(header: str, path: str) -> str:
    """The delimiter of a header. Raises TableError if it could be several."""
    bare = "".join(header.split('"')[::2])
    found = [delimiter for delimiter in _OTHER_DELIMITERS if delimiter in bare]
    if "," in bare or not found:
        return ","
    if len(found) > 1:
        raise TableError(
            f"{path}: its columns may be separated by {' or '.join(map(repr, found))}: name it with --delimiter."
        )
    return found[0]


def _header(record: Record | None, path: str) -> list[str]:
    if record is None:
        raise TableError(f"{path} is empty: its first line must name the columns.")
    if record.fault or not is_readable(record.text):
        raise TableError(
            f"{path}: line {record.line} {record.fault or 'is no text in its encoding: name another with --encoding.'}"
        )
    names = record.cells
    if any(name.strip().lower().startswith(_URLS) for name in names):
        raise TableError(f"{path}: its first line holds a URL where the names of columns belong: write them above it.")
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice == "":
        raise TableError(f"{path}: several columns have no name: name them, or remove delimiters at the header's end.")
    if twice is not None:
        raise TableError(f"{path}: two columns are called {twice!r}: rename one.")
    return names
