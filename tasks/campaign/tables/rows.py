"""What every table gives and takes: rows, the rows that could not be read, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeAlias

#: Values by column.
Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read. It keeps its number, and fails alone."""

    #: A sentence with the place in the file and the cure.
    reason: str
    #: The cells that could be read.
    values: Row = field(default_factory=dict)


def values_of(row: Mapping[str, Any] | BadRow) -> Mapping[str, Any]:
    """A row's cells; of one that cannot be read, those that could."""
    return row.values if isinstance(row, BadRow) else row


class Picture(str):
    """A picture of a folder or an archive: its name as text, and its bytes when they are read."""

    __slots__ = ("_load",)
    _load: Callable[[], bytes]

    def __new__(cls, name: str, load: Callable[[], bytes]) -> Self:
        picture = super().__new__(cls, name)
        picture._load = load
        return picture

    def read(self) -> bytes:
        """The picture's file. Raises OSError."""
        return self._load()


class Table(Protocol):
    """An input. Each iteration reads it anew from its start, and needs memory for some rows only."""

    @property
    def columns(self) -> list[str]:
        """Names of the columns. Where each row names its own (JSONL, WebDataset), those of the rows read so far."""

    @property
    def count(self) -> int | None:
        """Number of rows, where it is known without reading them."""

    @property
    def schema(self) -> Any:
        """The pyarrow.Schema of a typed table; None otherwise."""

    @property
    def notes(self) -> list[str]:
        """What was assumed about the file and the user should know: sentences."""

    def __iter__(self) -> Iterator[Row | BadRow]: ...


class Writer(Protocol):
    """An output, which appears whole when the context ends without an exception; otherwise it stays as it was."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row. Columns that it lacks are null."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...
