"""Several files as one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import TableError
from .files import is_url
from .jsonl_table import JsonlTable
from .rows import BadRow, Row, Table
from .webdataset_table import WebDatasetTable

#: Tables whose columns grow with their rows. To open them takes reading many, so each is opened in its turn.
_GROWING = (JsonlTable, WebDatasetTable)


class ShardedTable:
    """The rows of several files with the same columns, one file after the other.

    Only in JSONL and WebDataset, where each row names its columns, may later files have further ones.
    """

    def __init__(self, paths: Sequence[str], open_one: Callable[[str], Table]) -> None:
        """`open_one` opens a file. Raises TableError if one is missing, or differs from the first."""
        self._paths, self._open = paths, open_one
        self._names = _short(paths)
        self._first = open_one(paths[0])
        self._columns = dict.fromkeys(self._first.columns)
        self.schema: Any = self._first.schema
        self._tables: list[Table] = []
        if isinstance(self._first, _GROWING):
            _check_there(paths)
        else:
            self._tables = [self._first, *map(self._opened_like_first, paths[1:])]

    @property
    def columns(self) -> list[str]:
        return list(self._columns)

    @property
    def count(self) -> int | None:
        counts = [table.count for table in self._tables]
        return sum(filter(None, counts)) if counts and None not in counts else None

    @property
    def notes(self) -> list[str]:
        """Each note once, with the first file that it is about."""
        first: dict[str, str] = {}
        for name, table in zip(self._names, self._tables or [self._first], strict=False):
            for note in table.notes:
                first.setdefault(note, name)
        return [f"{name}: {note}" for note, name in first.items()]

    def __iter__(self) -> Iterator[Row | BadRow]:
        for place, name in enumerate(self._names):
            table = self._table(place)
            try:
                for row in table:
                    yield BadRow(f"{name}: {row.reason}", row.values) if isinstance(row, BadRow) else row
            finally:
                self._columns.update(dict.fromkeys(table.columns))

    def _table(self, place: int) -> Table:
        if self._tables:
            return self._tables[place]
        return self._open(self._paths[place]) if place else self._first

    def _opened_like_first(self, path: str) -> Table:
        table = self._open(path)
        first = self._paths[0]
        if type(table) is not type(self._first):
            raise TableError(f"{path} is of another format than {first}: name files of one format.")
        lacking = [name for name in self._columns if name not in table.columns]
        further = [name for name in table.columns if name not in self._columns]
        if lacking or further:
            told = [f"lacks {', '.join(map(repr, lacking))}"] if lacking else []
            told += [f"has {', '.join(map(repr, further))} besides"] if further else []
            raise TableError(
                f"{path} {' and '.join(told)}, compared with {first}: give all files the same columns, or leave it out."
            )
        if self.schema is not None:
            self._widen_types(table.schema, path)
        return table

    def _widen_types(self, schema: Any, path: str) -> None:
        """Choose types that hold a file's values too: of a column without any value, or of int and float."""
        import pyarrow as pa

        try:
            self.schema = pa.unify_schemas([self.schema, schema], promote_options="permissive")
        except pa.ArrowException as error:
            raise TableError(
                f"{path} has other types than {self._paths[0]}: give all files the same, or leave it out. {error}"
            ) from None


def _check_there(paths: Sequence[str]) -> None:
    missing = next((path for path in paths if not is_url(path) and not Path(path).exists()), None)
    if missing is not None:
        raise TableError(f"There is no file {missing}.")


def _short(paths: Sequence[str]) -> list[str]:
    """The files' names, or their paths if names repeat."""
    names = [PurePosixPath(path.partition("?")[0] if is_url(path) else path).name for path in paths]
    return names if len(set(names)) == len(names) else list(paths)
