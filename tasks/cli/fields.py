"""Parses a task's fields as written in a shell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_origin

import click

from ..payloads import Job
from ..picture_forms import media_type
from ..pictures import Image


def arguments(payload: type[Job], fields: tuple[str, ...]) -> dict[str, Any]:
    """The shell's name=value fields as a task's keyword arguments. Raises click.UsageError."""
    found: dict[str, Any] = {}
    for field in fields:
        name, value = _field(field)
        if _is_list(payload, name) and not isinstance(value, list):
            found.setdefault(name, []).append(value)
        else:
            found[name] = value
    return found


def _field(field: str) -> tuple[str, Any]:
    name, separator, value = field.partition("=")
    if not separator:
        raise click.UsageError(f"{field!r} is not name=value.")
    if name.endswith(":"):
        try:
            return name[:-1], json.loads(value)
        except ValueError as error:
            raise click.UsageError(f"{name[:-1]} is not JSON: {error}") from None
    if value.startswith("@"):
        return name, data_uri(Path(value[1:]))
    if is_picture_meant(name, value):
        raise click.UsageError(f"{name}: {value} is a file: write {name}=@{value} to send it.")
    return name, value


def _is_list(payload: type[Job], name: str) -> bool:
    field = payload.model_fields.get(name)
    return field is not None and get_origin(field.annotation) is list


def is_picture_meant(name: str, value: str) -> bool:
    """Whether a value is the name of a file to send: a picture, or any file where only an image is allowed."""
    try:
        path = Path(value)
        if len(value) > 4096 or not path.is_file():
            return False
        with path.open("rb") as file:
            return name in ("image", "images") or media_type(file.read(64)) is not None
    except (OSError, ValueError):
        return False


def data_uri(path: Path) -> str:
    """A picture's file as a `data:` URI. Raises click.UsageError if it cannot be read, or ImageInvalid."""
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise click.UsageError(f"Cannot read {path}: {problem}.") from None
    return Image.from_bytes(content)
