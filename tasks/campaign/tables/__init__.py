"""Tables as campaigns read and write them: `open_table` and `open_writer`.

CSV, TSV and JSONL in local files need nothing further; Parquet, Arrow, .zst files and URLs need the extra `data`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import TableError
from .csv_table import CsvTable
from .files import suffixes
from .jsonl_table import JsonlTable
from .rows import BadRow, Picture, Row, Table, Writer
from .text_writers import CsvWriter, JsonlWriter

__all__ = ["BadRow", "Picture", "Row", "Table", "TableError", "Writer", "open_table", "open_writer"]

_JSONL = (".jsonl", ".ndjson")
_DELIMITED = {".csv": ",", ".tsv": "\t", ".tab": "\t"}


def open_table(path: str, *, encoding: str | None = None, delimiter: str | None = None) -> Table:
    """The table of a file, by the suffix of its name. Its header or its first rows are read at once.

    `encoding` and `delimiter` are those of a text file; None: recognized, and told in `notes` where it is a guess.
    Raises TableError.
    """
    form = suffixes(path)[0]
    if form in _DELIMITED:
        return CsvTable(path, encoding=encoding, delimiter=delimiter, is_tsv=_DELIMITED[form] == "\t")
    if form in _JSONL:
        return JsonlTable(path, encoding=encoding)
    raise TableError(f"{path}: {form or 'a file without a suffix'} is no known table: use .csv, .tsv or .jsonl.")


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
    raise TableError(f"{path}: {form or 'a file without a suffix'} cannot be written: use .parquet, .csv or .jsonl.")
