"""`idefics-jobs` that stops while it writes a campaign's output, for a test that kills it there."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from tasks.campaign import output
from tasks.cli import main

#: What is printed when it stops, after so many rows.
STOPPED, ROWS = "the output is written in part", 100


class _Stopping:
    """A table's writer that never writes all rows."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._rows = 0

    def write(self, row: Mapping[str, Any]) -> None:
        self._writer.write(row)
        self._rows += 1
        if self._rows == ROWS:
            print(STOPPED, flush=True)
            threading.Event().wait()


@contextlib.contextmanager
def _opened(*arguments: Any) -> Iterator[_Stopping]:
    with _open_writer(*arguments) as writer:
        yield _Stopping(writer)


if __name__ == "__main__":
    _open_writer = output.open_writer
    output.open_writer = _opened  # type: ignore[assignment]
    main(sys.argv[1:])
