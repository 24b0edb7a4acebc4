"""Tables in Parquet and Arrow (Feather, IPC), row by row."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Self

from ..errors import TableError
from .files import arrow, raw, reported, suffixes
from .rows import BadRow, Row

#: Rows and bytes that are read at once.
BATCH_ROWS, BATCH_BYTES = 1_000, 8_000_000
_READ_BYTES = 1 << 18


class Exact(str):
    """A value that Python has no type for, such as a time in nanoseconds: its text, and the value for an output."""

    __slots__ = ("scalar",)
    scalar: Any

    def __new__(cls, scalar: Any) -> Self:
        value = super().__new__(cls, _text(scalar))
        value.scalar = scalar
        return value


def _text(scalar: Any) -> str:
    import pyarrow as pa

    try:
        return str(scalar.cast(pa.string()).as_py())
    except (pa.ArrowException, ValueError):
        return str(getattr(scalar, "value", scalar.type))


class ArrowTable:
    """The base of typed tables."""

    notes: list[str] = []

    def __init__(self, path: str) -> None:
        """Raises TableError if the file is of another kind, or has two columns of one name."""
        if compression := suffixes(path)[1]:
            raise TableError(f"{path} is compressed as a whole ({compression}), which its format is within: unpack it.")
        self._path = path
        arrow(path)
        with self._opened() as reader:
            self.schema, self.count = self._about(reader)
        self.columns: list[str] = list(self.schema.names)
        twice = next((name for place, name in enumerate(self.columns) if name in self.columns[:place]), None)
        if twice is not None:
            raise TableError(f"{path}: two columns are called {twice!r}: rename one.")

    def __iter__(self) -> Iterator[Row | BadRow]:
        with self._opened() as reader:
            for batch in self._batches(reader):
                yield from _rows(batch, self.columns)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        import pyarrow as pa

        try:
            with reported(self._path), raw(self._path) as file:
                yield self._reader(file)
        except pa.ArrowException as error:
            raise TableError(f"{self._path} cannot be read: {error}") from None

    def _reader(self, file: BinaryIO) -> Any:
        raise NotImplementedError

    def _about(self, reader: Any) -> tuple[Any, int | None]:
        """The schema, and the number of rows where it is known."""
        raise NotImplementedError

    def _batches(self, reader: Any) -> Iterator[Any]:
        raise NotImplementedError


class ParquetTable(ArrowTable):
    """A Parquet file. Memory does not grow with the size of its row groups."""

    def _reader(self, file: BinaryIO) -> Any:
        from pyarrow import parquet

        # Without read-ahead, which would take in a whole row group.
        return parquet.ParquetFile(file, buffer_size=_READ_BYTES, pre_buffer=False)

    def _about(self, reader: Any) -> tuple[Any, int | None]:
        return reader.schema_arrow, reader.metadata.num_rows

    def _batches(self, reader: Any) -> Iterator[Any]:
        groups = (reader.metadata.row_group(number) for number in range(reader.metadata.num_row_groups))
        largest = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=1)
        rows = _batch_rows(largest)
        yield from reader.iter_batches(batch_size=rows, use_threads=False)


class IpcTable(ArrowTable):
    """An Arrow file (Feather, version 2) or stream."""

    def _reader(self, file: BinaryIO) -> Any:
        import pyarrow as pa

        start = file.read(6)
        file.seek(0)
        return pa.ipc.open_file(file) if start == b"ARROW1" else pa.ipc.open_stream(file)

    def _about(self, reader: Any) -> tuple[Any, int | None]:
        return reader.schema, reader.count_rows() if hasattr(reader, "count_rows") else None

    def _batches(self, reader: Any) -> Iterator[Any]:
        has_places = hasattr(reader, "get_batch")
        batches = map(reader.get_batch, range(reader.num_record_batches)) if has_places else reader
        for batch in batches:
            rows = _batch_rows(batch.nbytes / max(batch.num_rows, 1))
            yield from (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))


def _batch_rows(bytes_each: float) -> int:
    return max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(bytes_each, 1))))


def _rows(batch: Any, names: Sequence[str]) -> Iterator[Row]:
    for values in zip(*map(_values, batch.columns), strict=True):
        yield dict(zip(names, values, strict=True))


def _values(column: Any) -> list[Any]:
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError):
        return [Exact(scalar) if scalar.is_valid else None for scalar in column]
