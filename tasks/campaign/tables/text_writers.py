"""Outputs in CSV, TSV and JSONL."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from ...picture_forms import media_type
from ..errors import TableError
from .files import Replacement


class TextWriter:
    """The base: a file that replaces the output at the end of a context without an exception."""

    def __init__(self, path: str) -> None:
        """Raises TableError if the output cannot be made."""
        self._path = path
        self._replacement = Replacement(path)
        try:
            self._file = io.TextIOWrapper(self._replacement.opened(), "utf-8", errors="replace", newline="")
        except BaseException:
            self._replacement.discard()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._file.close()
            if error[0] is None:
                self._replacement.commit()
        except OSError as problem:
            raise TableError(f"Cannot write {self._path}: {problem.strerror}.") from None
        finally:
            self._replacement.discard()

    def _write(self, text: str) -> None:
        try:
            self._file.write(text)
        except OSError as error:
            raise TableError(f"Cannot write {self._path}: {error.strerror}.") from None


class JsonlWriter(TextWriter):
    """One JSON object a line, with the row's own keys."""

    def write(self, row: Mapping[str, Any]) -> None:
        self._write(f"{as_json(row)}\n")


class CsvWriter(TextWriter):
    """RFC 4180 in UTF-8. A null is an empty field, an empty text two quotes; nested values are JSON."""

    def __init__(self, path: str, columns: Sequence[str], delimiter: str = ",") -> None:
        """Raises TableError if the output cannot be made."""
        super().__init__(path)
        self._columns = list(columns)
        self._known = frozenset(columns)
        self._delimiter = delimiter
        self._csv = csv.writer(_Sink(self._line), delimiter=delimiter, lineterminator="\r\n")
        self._csv.writerow(columns)

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row. Raises TableError for a column that the header lacks."""
        check_columns(self._path, self._known, row)
        cells = [text_cell(row.get(name)) for name in self._columns]
        if "" in cells:
            self._line(f"{self._delimiter.join(map(self._quoted, cells))}\r\n")
        else:
            self._csv.writerow(cells)

    def _quoted(self, cell: str | None) -> str:
        # Python's writer tells nulls and empty texts apart from 3.12 on.
        doubled = (cell or "").replace('"', '""')
        return "" if cell is None else f'"{doubled}"'

    def _line(self, text: str) -> None:
        # Python's writer leaves a bare carriage return in a field unquoted unless its line ends have one.
        self._write(f"{text[:-2]}\n")


def check_columns(path: str, known: frozenset[str], row: Mapping[str, Any]) -> None:
    """Raises TableError for a row with a column that the output at `path` lacks."""
    if not known.issuperset(row):
        name = next(name for name in row if name not in known)
        raise TableError(f"{path}: column {name!r} is not among those that were known at its beginning.")


class _Sink:
    """What csv.writer writes to."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write = write


def text_cell(value: Any) -> str | None:
    """A value in CSV, or in a column of texts; None for a null and for a picture's bytes."""
    if value is None or type(value) is str:
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return _bytes(value)
    return as_json(value) if isinstance(value, bool | dict | list | tuple) else str(value)


def _for_json(value: Any) -> Any:
    return _bytes(value) if isinstance(value, bytes | bytearray | memoryview) else str(value)


_ENCODER = json.JSONEncoder(ensure_ascii=False, default=_for_json, allow_nan=False)


def as_json(value: Any) -> str:
    """A value as JSON on one line. Pictures' bytes, NaN and infinity become null."""
    try:
        return _ENCODER.encode(value)
    except ValueError:
        return _ENCODER.encode(_finite(value))


def _bytes(value: bytes | bytearray | memoryview) -> str | None:
    """Bytes in base64; None for a picture: a text output does not repeat the input's pictures."""
    content = bytes(value)
    return None if media_type(content) else base64.b64encode(content).decode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
