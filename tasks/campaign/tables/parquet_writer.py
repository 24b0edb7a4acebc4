"""Outputs in Parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from ..errors import TableError
from .arrow_tables import Exact
from .files import Replacement, arrow, suffixes
from .text_writers import as_json, check_columns, text_cell

#: Rows and bytes that are converted together.
BATCH_ROWS, BATCH_BYTES = 1_000, 8_000_000
#: Rows and bytes of a row group.
GROUP_ROWS, GROUP_BYTES = 100_000, 64_000_000
#: Metadata that lists all columns: with others added, readers would refuse the table.
_OF_ALL_COLUMNS = b"huggingface"


class ParquetWriter:
    """A Parquet file with the input's types. Columns without a type are texts, with nested values as JSON."""

    def __init__(self, path: str, columns: Sequence[str], schema: Any, types: Mapping[str, type]) -> None:
        """Raises TableError if the output cannot be made."""
        if compression := suffixes(path)[1]:
            raise TableError(f"{path}: Parquet is compressed within: leave {compression} out.")
        arrow(path)
        from pyarrow import parquet

        self._path = path
        self._schema = _schema(columns, schema, types)
        self._known = frozenset(columns)
        typed = frozenset(() if schema is None else schema.names)
        self._texts = {name for name in columns if name not in typed and types.get(name, str) is str}
        self._objects = {name for name in columns if name not in typed and types.get(name) is object}
        self._rows: list[Mapping[str, Any]] = []
        self._bytes = 0
        #: Of the row group.
        self._batches: list[Any] = []
        self._replacement = Replacement(path)
        try:
            self._file = parquet.ParquetWriter(self._replacement.path, self._schema)
        except BaseException:
            self._replacement.discard()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if error[0] is None:
                self._end_batch()
                self._end_group()
            self._file.close()
            if error[0] is None:
                self._replacement.commit()
        except OSError as problem:
            raise TableError(f"Cannot write {self._path}: {problem}.") from None
        finally:
            self._replacement.discard()

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row. Raises TableError for an unknown column, and later for a value that does not fit its column."""
        check_columns(self._path, self._known, row)
        self._rows.append(row)
        self._bytes += sum(map(_size, row.values()))
        if len(self._rows) >= BATCH_ROWS or self._bytes >= BATCH_BYTES:
            self._end_batch()

    def _end_batch(self) -> None:
        import pyarrow as pa

        arrays = [self._array(field) for field in self._schema]
        self._batches.append(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self._rows, self._bytes = [], 0
        rows, size = sum(batch.num_rows for batch in self._batches), sum(batch.nbytes for batch in self._batches)
        if rows >= GROUP_ROWS or size >= GROUP_BYTES:
            self._end_group()

    def _end_group(self) -> None:
        import pyarrow as pa

        try:
            self._file.write_table(pa.Table.from_batches(self._batches, self._schema), row_group_size=GROUP_ROWS)
        except OSError as error:
            raise TableError(f"Cannot write {self._path}: {error}.") from None
        self._batches = []

    def _array(self, field: Any) -> Any:
        import pyarrow as pa

        values = [row.get(field.name) for row in self._rows]
        if field.name in self._texts:
            values = [text_cell(value) for value in values]
        elif field.name in self._objects:
            values = [None if value is None else as_json(value) for value in values]
        elif any(type(value) is Exact for value in values):
            values = [value.scalar if isinstance(value, Exact) else value for value in values]
        try:
            return pa.array(values, field.type)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise TableError(
                f"{self._path}: a value does not fit column {field.name!r} ({field.type}): {error}"
            ) from None


def _schema(columns: Sequence[str], schema: Any, types: Mapping[str, type]) -> Any:
    import pyarrow as pa

    of_types = {int: pa.int64(), float: pa.float64()}
    known = {} if schema is None else {field.name: field.with_nullable(True) for field in schema}
    fields = [known.get(name) or pa.field(name, of_types.get(types.get(name, str), pa.string())) for name in columns]
    metadata = {} if schema is None else dict(schema.metadata or {})
    metadata.pop(_OF_ALL_COLUMNS, None)
    return pa.schema(fields, metadata)


def _size(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    return sum(map(_size, value.values())) if isinstance(value, dict) else 8
