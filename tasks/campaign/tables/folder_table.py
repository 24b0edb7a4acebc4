"""A folder of pictures as a table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import ImageTooLarge, JobError
from ...protocol import MAX_JOB_BYTES
from ..errors import TableError
from .files import is_url, located, reported
from .rows import BadRow, Picture, Row

#: Suffixes of pictures, also of those that workers refuse, so that such a file fails with its reason.
PICTURE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".avif", ".bmp", ".tif", ".tiff", ".heic", ".heif")
)


class FolderTable:
    """The pictures below a folder, in the order of their names, folder by folder.

    Columns: `file`, the picture with its path from there, and `folder`, the name of the folder that it is in: in many
    collections its class. Symbolic links that lead out of the folder are not followed.
    """

    count: int | None = None
    schema: None = None
    columns: list[str]

    def __init__(self, path: str) -> None:
        """Raises TableError if there is no picture."""
        self._path = path
        self.columns = ["file", "folder"]
        self.notes: list[str] = []
        with reported(path):
            if next(iter(self), None) is None:
                raise TableError(f"{path} has no pictures: their names end in .jpg, .png, .webp, .gif or .avif.")

    def __iter__(self) -> Iterator[Row | BadRow]:
        with reported(self._path):
            yield from _remote(self._path) if is_url(self._path) else _local(Path(self._path))


def _local(root: Path) -> Iterator[Row | BadRow]:
    whole = root.resolve()
    for folder, folders, files in os.walk(root, onerror=_raise):
        folders.sort()
        for name in sorted(filter(_is_picture, files)):
            path = Path(folder, name)
            row = _row(_text(path.relative_to(root).as_posix()), partial(_content, path))
            if path.is_symlink() and not path.resolve().is_relative_to(whole):
                yield BadRow(f"{row['file']} is a link out of the folder: copy the picture into it.", row)
            elif not path.is_file():
                # A pipe would be waited for.
                yield BadRow(f"{row['file']} is no file: remove it.", row)
            else:
                yield row


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        return _bounded(file.read(MAX_JOB_BYTES + 1))


def _fetched(files: Any, path: str) -> bytes:
    try:
        return _bounded(files.cat_file(path, end=MAX_JOB_BYTES + 1))
    except (OSError, JobError):
        raise
    except Exception as error:
        # Each of fsspec's filesystems has exceptions of its own.
        raise OSError(str(error)) from None


def _bounded(content: bytes) -> bytes:
    if len(content) > MAX_JOB_BYTES:
        raise ImageTooLarge(f"The picture has more than {MAX_JOB_BYTES:,} bytes: scale it down.", detail="bytes")
    return content


def _remote(url: str) -> Iterator[Row]:
    files, root = located(url)
    root = root.rstrip("/")
    for folder, folders, names in files.walk(root, on_error="raise"):
        folders.sort()
        for name in sorted(filter(_is_picture, names)):
            path = f"{folder}/{name}"
            yield _row(path[len(root) :].lstrip("/"), partial(_fetched, files, path))


def _row(name: str, load: Callable[[], Any]) -> Row:
    return {"file": Picture(name, load), "folder": PurePosixPath(name).parent.name}


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in PICTURE_SUFFIXES and not name.startswith(".")


def _text(name: str) -> str:
    """A file's name, whose bytes may be no UTF-8."""
    return os.fsencode(name).decode(errors="replace")


def _raise(error: OSError) -> None:
    raise error
