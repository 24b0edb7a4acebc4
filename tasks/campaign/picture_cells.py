"""A cell with a picture, as a payload takes it: a URL as it is, bytes inline, a file's name only where allowed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ImageInvalid, ImageTooLarge, InvalidRequest
from ..image_sources import is_inner_path
from ..pictures import Image
from .errors import PlanError
from .tables.rows import Picture
from .templates import empty, is_empty

_URL = re.compile(r"\s*(?:[a-z][a-z0-9+.-]*://|data:)", re.IGNORECASE)


def is_picture(value: Any) -> bool:
    """Whether a cell holds a picture itself: bytes, a file of a folder or archive, or HuggingFace's struct."""
    return isinstance(value, bytes | Picture) or is_struct(value)


def is_struct(value: Any) -> bool:
    """HuggingFace's form of a picture: `{"bytes": ..., "path": ...}`."""
    return isinstance(value, Mapping) and value.keys() == {"bytes", "path"}


@dataclass(frozen=True)
class PictureCells:
    """Which names of files are allowed in cells with pictures."""

    #: The producer's folder whose files are sent inline; nothing outside it is read.
    folder: str | None = None
    #: Whether names are of files below the workers' image root.
    are_workers_paths: bool = False

    @cached_property
    def _root(self) -> Path:
        assert self.folder is not None
        root = Path(self.folder).resolve()
        if not root.is_dir():
            raise PlanError(f"images_in: there is no folder {self.folder}.")
        return root

    def check(self) -> None:
        """Raises PlanError for options that cannot be met."""
        if self.folder is not None and self.are_workers_paths:
            raise PlanError("Pictures are files in a folder here or below the workers' image root: choose one.")
        if self.folder is not None:
            assert self._root

    def image(self, value: Any, column: str) -> Any:
        """A payload's image. Raises a JobError naming the column."""
        if is_struct(value):
            value = value["bytes"] if value["bytes"] is not None else value["path"]
        if is_empty(value):
            raise empty(column)
        try:
            if isinstance(value, Picture):
                return Image.from_bytes(value.read())
            if isinstance(value, bytes):
                return Image.from_bytes(value)
            if isinstance(value, str):
                return value if _URL.match(value) else self._file(value.strip(), column)
        except OSError as error:
            told = f"Column {column!r}: the picture cannot be read ({error.strerror or error}): check it."
            raise ImageInvalid(told, detail="no_file") from None
        except (ImageInvalid, ImageTooLarge) as error:
            raise type(error)(f"Column {column!r}: {error}", detail=error.detail) from None
        raise InvalidRequest(f"Column {column!r} holds no picture but a {type(value).__name__}: use another column.")

    def _file(self, name: str, column: str) -> Any:
        if self.are_workers_paths:
            return {"path": name}
        if self.folder is None:
            raise InvalidRequest(
                f"Column {column!r} holds no URL: write http(s)://host/path, or say in which folder its files are."
            )
        path = self._inner(name)
        if path is None:
            raise InvalidRequest(f"Column {column!r} names no file in the pictures' folder: check the name.")
        return Image.from_file(path)

    def _inner(self, name: str) -> Path | None:
        """The file, if it is in the folder, also after symbolic links are followed."""
        if not is_inner_path(name):
            return None
        try:
            path = (self._root / name).resolve(strict=True)
        except (OSError, RuntimeError):
            return None
        return path if path.is_relative_to(self._root) and path.is_file() else None
