"""The records of a CSV text: Python's own parser, made to go on after a broken record, with a bound on its memory."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

#: Characters of a record, which may be many lines: the parser needs four bytes for each.
MAX_RECORD_CHARS = 8_000_000


@dataclass(frozen=True, slots=True)
class Record:
    """One record, or why there is none."""

    #: Of its first line in the file, from 1.
    line: int
    #: Its text.
    text: str
    cells: list[str]
    #: A sentence's predicate (`has ...`); empty for a good record.
    fault: str = ""


class _TooLong(Exception):
    pass


class _Lines:
    """The parser's source, which remembers the lines of the record that is being read."""

    def __init__(self, source: Iterator[str]) -> None:
        self._source = source
        self._again: deque[str] = deque()
        self._chars = 0
        self.record: list[str] = []
        #: The number of the record's first line.
        self.number = 1

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._source)
        self.record.append(line)
        self._chars += len(line)
        if self._chars > MAX_RECORD_CHARS:
            raise _TooLong
        return line

    def begin(self) -> None:
        """A new record."""
        self.number += len(self.record)
        self.record.clear()
        self._chars = 0

    def rewind(self) -> None:
        """Read all lines of the record but the first again."""
        self._again.extendleft(reversed(self.record[1:]))
        del self.record[1:]


def records(source: Iterator[str], delimiter: str) -> Iterator[Record]:
    """The records of lines, which have their ends. Blank lines give none.

    Of a record with a wrong quote only the first line is lost: a quote that does not end would take in all the rest.
    """
    lines = _Lines(source)
    # Of the whole process, by which other readers are allowed more, too. Our own bound is that of a record.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_CHARS))
    while True:
        try:
            for cells in csv.reader(lines, delimiter=delimiter, strict=True):
                if cells:
                    text = lines.record[0] if len(lines.record) == 1 else "".join(lines.record)
                    yield Record(lines.number, text, cells)
                lines.begin()
            return
        except _TooLong:
            fault = f"has no end within {MAX_RECORD_CHARS:,} characters: is a quote missing?"
        except csv.Error as error:
            fault = f"is not CSV ({error}): put quotes around a field with quotes in it, and double those."
        lines.rewind()
        yield Record(lines.number, lines.record[0], [], fault)
        lines.begin()


def nulls(record: Record) -> list[bool]:
    """For each cell whether it is empty without quotes, which Python's parser before 3.13 does not tell."""
    if '""' not in record.text:
        return [not cell for cell in record.cells]
    found, place = [], 0
    for cell in record.cells:
        is_quoted = record.text.startswith('"', place)
        found.append(not cell and not is_quoted)
        place += len(cell) + (cell.count('"') + 2 if is_quoted else 0) + 1
    return found
