"""Tables as campaigns read and write them: `open_table` and `open_writer`.

CSV, TSV, JSONL, tar files and folders on a local disk need nothing further; Parquet, Arrow, .zst files and URLs need
the extra `data`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ..errors import TableError
from .arrow_tables import IpcTable, ParquetTable
from .csv_table import CsvTable
from .files import is_folder, suffixes
from .folder_table import FolderTable
from .jsonl_table import JsonlTable
from .parquet_writer import ParquetWriter
from .patterns import is_pattern, matching_files
from .rows import BadRow, Picture, Row, Table, Writer, values_of
from .sharded_table import ShardedTable
from .text_writers import CsvWriter, JsonlWriter
from .webdataset_table import WebDatasetTable

__all__ = [
    "BadRow",
    "Picture",
    "Row",
    "Table",
    "TableError",
    "Writer",
    "check_output",
    "open_table",
    "open_writer",
    "values_of",
]

_JSONL = (".jsonl", ".ndjson", ".json")
_DELIMITED = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_PARQUET = (".parquet", ".pq")
_ARROW = (".arrow", ".feather", ".ipc")


def open_table(path: str, *, encoding: str | None = None, delimiter: str | None = None) -> Table:
    """The table of a file, by the suffix of its name, or of a folder. Its header or its first rows are read at once.

    CSV, TSV, JSONL, Parquet, Arrow and Feather, WebDataset tar, a folder of pictures; text and tar also compressed.
    A pattern (`part-*.parquet`, `{00..99}.tar`) gives the rows of all its files in order.

    `encoding` and `delimiter` are those of a text file; None: recognized, and told in `notes` where it is a guess.
    Raises TableError.
    """
    if is_pattern(path):
        return ShardedTable(matching_files(path), partial(_open_one, encoding=encoding, delimiter=delimiter))
    return _open_one(path, encoding, delimiter)


def _open_one(path: str, encoding: str | None, delimiter: str | None) -> Table:
    form = suffixes(path)[0]
    if form in _DELIMITED:
        return CsvTable(path, encoding=encoding, delimiter=delimiter, is_tsv=_DELIMITED[form] == "\t")
    if form in _JSONL:
        return JsonlTable(path, encoding=encoding)
    if form in _PARQUET:
        return ParquetTable(path)
    if form in _ARROW:
        return IpcTable(path)
    if form == ".tar":
        return WebDatasetTable(path)
    if is_folder(path):
        return FolderTable(path)
    known = ", ".join((*_DELIMITED, *_JSONL, *_PARQUET, *_ARROW, ".tar"))
    raise TableError(f"{path}: {_named(form)} is no known table: use a folder of pictures, or one of {known}.")


def open_writer(
    path: str, columns: Sequence[str], schema: Any = None, types: Mapping[str, type] | None = None
) -> Writer:
    """The output, by the suffix of its name, which is replaced at the end of the context.

    `columns` are those of the rows in order. `schema`, a pyarrow.Schema, types the input's among them, and `types`
    (str, int, float, object) others; the rest are texts. Only Parquet has types. Raises TableError.
    """
    form = suffixes(path)[0]
    if form in _DELIMITED:
        return CsvWriter(path, columns, _DELIMITED[form])
    if form in _JSONL:
        return JsonlWriter(path)
    if form in _PARQUET:
        return ParquetWriter(path, columns, schema, types or {})
    raise TableError(f"{path}: {_named(form)} cannot be written: use .parquet, .csv, .tsv or .jsonl.")


class _Checked(Exception):
    pass


def check_output(path: str) -> None:
    """Raises TableError if an output could not be made: to be called before a long run."""
    with contextlib.suppress(_Checked), open_writer(path, ["a"]):
        # So that an output which is there already stays.
        raise _Checked


def _named(form: str) -> str:
    return form or "a file without a suffix"
