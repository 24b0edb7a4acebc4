"""A lock against a second run with the same output: a file that is held as long as the process lives."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from .errors import CampaignError

if sys.platform != "win32":
    import fcntl


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock during the block. Raises CampaignError where another process holds it, or the file cannot be made.

    A killed process holds it no longer. On Windows there is none.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CampaignError(f"Cannot write {path}: {error.strerror}.") from None
    try:
        _take(file, path)
        yield
        # While it is held: a file that another process had just opened is not removed by us afterwards.
        path.unlink(missing_ok=True)
    finally:
        os.close(file)


def _take(file: int, path: Path) -> None:
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_current = path.exists() and os.path.samestat(os.fstat(file), path.stat())
    except OSError:
        is_current = False
    if not is_current:
        # Held, or removed by its holder meanwhile.
        raise CampaignError("Another run writes to this output: wait for it, or stop it.")
