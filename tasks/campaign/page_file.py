"""Writes a page's file."""

from __future__ import annotations

from .errors import TableError
from .tables.files import Replacement


def write_page(path: str, page: str) -> None:
    """Write a page's file whole or not at all. Raises TableError."""
    replacement = Replacement(path)
    try:
        with replacement.opened() as file:
            file.write(page.encode())
        replacement.commit()
    except OSError as error:
        raise TableError(f"Cannot write {path}: {error.strerror}.") from None
    finally:
        replacement.discard()
