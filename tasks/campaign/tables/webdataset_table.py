"""A WebDataset as a table: a tar file in which neighbouring files with one name before the first dot are a row."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import PurePosixPath
from typing import Any

from ...protocol import MAX_JOB_BYTES
from ..errors import TableError
from .files import opened
from .folder_table import PICTURE_SUFFIXES
from .rows import BadRow, Picture, Row

#: Rows from which the columns are known at first.
HEAD_ROWS = 100
#: Bytes of a file that is read as a text.
MAX_TEXT_BYTES = 1_000_000
#: Files of a row, all of which are in memory.
MAX_FILES = 20


@dataclass(frozen=True, slots=True)
class _File:
    key: str
    #: What stands after its first dot.
    suffix: str
    name: str
    #: None for one with too many bytes.
    content: bytes | None

    @property
    def is_picture(self) -> bool:
        return PurePosixPath(f"x.{self.suffix}").suffix in PICTURE_SUFFIXES

    @property
    def column(self) -> str:
        """`image`, or the suffix of another picture and of a text."""
        return "image" if self.is_picture and "." not in self.suffix else self.suffix


class WebDatasetTable:
    """Columns: `__key__`; `image`, the picture with a plain suffix; other pictures (`mask.png`) and texts (`txt`) by
    their suffix; and the keys of a `.json`. Other files are left out. `columns` grows as rows have further ones.
    """

    count: int | None = None
    schema: None = None

    def __init__(self, path: str) -> None:
        """Raises TableError if the file is no tar file, or an empty one."""
        self._path = path
        self.notes: list[str] = []
        self._columns: dict[str, None] = {}
        for _ in islice(self, HEAD_ROWS):
            pass
        if not self._columns:
            raise TableError(f"{path} has no files in it.")

    @property
    def columns(self) -> list[str]:
        return list(self._columns)

    def __iter__(self) -> Iterator[Row | BadRow]:
        for key, files in groupby(self._files(), key=lambda file: file.key):
            row = _row(key, list(islice(files, MAX_FILES + 1)))
            self._columns.update(dict.fromkeys(row.values if isinstance(row, BadRow) else row))
            yield row

    def _files(self) -> Iterator[_File]:
        try:
            with opened(self._path) as file, tarfile.open(fileobj=file, mode="r|") as tar:
                while (member := tar.next()) is not None:
                    # It would keep all of them.
                    tar.members = []  # type: ignore[attr-defined]
                    if member.isfile():
                        yield _read(tar, member)
        except tarfile.TarError as error:
            raise TableError(f"{self._path} is no whole tar file: {error}.") from None


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> _File:
    name = member.name.encode(errors="surrogateescape").decode(errors="replace")
    place = PurePosixPath(name)
    stem, _, suffix = place.name.partition(".")
    file = _File(str(place.with_name(stem)) if stem else name, suffix.lower(), name, None)
    content = tar.extractfile(member) if member.size <= (MAX_JOB_BYTES if file.is_picture else MAX_TEXT_BYTES) else None
    return file if content is None else _File(file.key, file.suffix, name, content.read())


def _row(key: str, files: list[_File]) -> Row | BadRow:
    row: Row = {"__key__": key}
    about: Row = {}
    for file in files:
        if file.column in row or len(files) > MAX_FILES:
            return BadRow(
                f"{key} has two files {file.column!r}, or more than {MAX_FILES}: give each picture a row.", row
            )
        if file.is_picture:
            if file.content is None:
                return BadRow(f"{file.name} has more than {MAX_JOB_BYTES:,} bytes: scale the picture down.", row)
            row[file.column] = _picture(file.name, file.content)
        elif (value := _text(file)) is not None:
            if isinstance(value, dict):
                about.update(value)
            else:
                row[file.column] = value
    return {**row, **{name: value for name, value in about.items() if name not in row}}


def _picture(name: str, content: bytes) -> Picture:
    return Picture(name, lambda: content)


def _text(file: _File) -> Any:
    """A file's text, an object of JSON, or None for other files."""
    try:
        text = None if file.content is None or b"\0" in file.content else file.content.decode("utf-8-sig")
        value = json.loads(text, parse_constant=lambda name: None) if text and file.suffix == "json" else text
    except (ValueError, RecursionError):
        return None
    return value.strip() if isinstance(value, str) else value
