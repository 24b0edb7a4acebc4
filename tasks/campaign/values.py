"""How a payload's field is made from a row: what `--set FIELD=VALUE` means for each kind of field. Pure.

A text is a template. Any other field takes JSON, whose texts are templates; or one `{column}` with such a value. A list
also takes plain values, one for each time that the field is set.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, Union, get_args, get_origin

from ..errors import InvalidRequest
from ..payloads import Job
from .errors import PlanError
from .picture_cells import PictureCells, is_picture
from .templates import Template, is_empty, template


@dataclass(frozen=True)
class Cell:
    """A column's value as it is; a text is read as JSON."""

    column: str


@dataclass(frozen=True)
class Pictures:
    """A column with a picture, or with a list of them where the field takes several."""

    column: str
    is_list: bool


#: Fields that may hold pictures where they are lists: the prompt of a caption is a text.
_LISTS_WITH_PICTURES = ("images", "prompt", "examples", "messages")

#: A field's value over a row: constants, with templates and cells in them.
Value: TypeAlias = Any


def value_of(payload: type[Job], field: str, given: str | Sequence[str]) -> Value:
    """The value that is `given` for a field, once or several times. Raises PlanError."""
    texts = [given] if isinstance(given, str) else list(given)
    is_list = _takes(payload, field, list)
    if len(texts) != 1 and not is_list:
        raise PlanError(f"{field} is set {len(texts)} times: set it once.")
    if field in ("image", "images") and len(texts) == 1:
        return _pictures(texts[0], field)
    if _takes(payload, field, str):
        return template(texts[0], field)
    if len(texts) == 1 and (whole := _whole(texts[0], field, is_list)) is not None:
        return whole
    return [_entry(text, field) for text in texts]


def takes_pictures(payload: type[Job], field: str) -> bool:
    """Whether a column with pictures stands for the pictures in a field. In others it stands for their files' names."""
    return field == "image" or (field in _LISTS_WITH_PICTURES and _takes(payload, field, list))


def _takes(payload: type[Job], field: str, kind: type) -> bool:
    annotation = payload.model_fields[field].annotation
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return any(_plain(member) is kind for member in members)


def _plain(annotation: Any) -> Any:
    """A type without what is annotated and without a list's entries."""
    while hasattr(annotation, "__metadata__"):
        annotation = get_args(annotation)[0]
    return get_origin(annotation) or annotation


def _pictures(text: str, field: str) -> Value:
    is_list = field == "images"
    found = template(text, field) if not text.lstrip().startswith("[") else None
    if found is None:
        return _tree(_json(text, field), field)
    if found.sole_column is not None:
        return Pictures(found.sole_column, is_list)
    return [found] if is_list else found


def _whole(text: str, field: str, is_list: bool) -> Value:
    """JSON or one column; None for a list's single plain value."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        pass
    else:
        return None if is_list and not isinstance(found, list) else _tree(found, field)
    try:
        column = template(text, field).sole_column
    except PlanError:
        column = None
    if column is not None:
        return Cell(column)
    if is_list:
        return None
    return _json(text, field)


def _json(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{field} takes JSON, or one column as in {{name}}: {error}.") from None


def _entry(text: str, field: str) -> Value:
    """One value of a list: an object in JSON, or a text."""
    if text.lstrip().startswith("{"):
        try:
            return _tree(json.loads(text), field)
        except ValueError:
            pass
    return template(text, field)


def _tree(value: Any, field: str) -> Value:
    if isinstance(value, str):
        found = template(value, field)
        return found if found.columns else "".join(text for text, _ in found.parts)
    if isinstance(value, list):
        return [_tree(entry, field) for entry in value]
    if isinstance(value, dict):
        return {name: _tree(entry, field) for name, entry in value.items()}
    return value


def columns_of(value: Value) -> Iterator[str]:
    """The columns that a value takes in."""
    if isinstance(value, Template):
        yield from value.columns
    elif isinstance(value, Cell | Pictures):
        yield value.column
    elif isinstance(value, list | dict):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from columns_of(entry)


def filled(value: Value, row: Mapping[str, Any], pictures: PictureCells | None) -> Any:
    """The value for a row; None where a field of one column alone is empty. Raises a JobError naming the column.

    `pictures`: None for a field without pictures, in which a file of a folder or an archive is its name.
    """
    if isinstance(value, Template):
        sole = value.sole_column
        if sole is not None and is_empty(row.get(sole)):
            return None
        return _filled_leaf(value, row, pictures)
    if isinstance(value, Cell):
        return _json_cell(row.get(value.column), value.column)
    if isinstance(value, Pictures):
        assert pictures is not None
        return _picture_cells(row.get(value.column), value, pictures)
    return _filled_tree(value, row, pictures)


def _filled_tree(value: Value, row: Mapping[str, Any], pictures: PictureCells | None) -> Any:
    if isinstance(value, Template):
        return _filled_leaf(value, row, pictures)
    if isinstance(value, list):
        return [_filled_tree(entry, row, pictures) for entry in value]
    if isinstance(value, dict):
        return {name: _filled_tree(entry, row, pictures) for name, entry in value.items()}
    return value


def _filled_leaf(value: Template, row: Mapping[str, Any], pictures: PictureCells | None) -> Any:
    sole = value.sole_column
    if pictures is not None and sole is not None and is_picture(row.get(sole)):
        return pictures.image(row[sole], sole)
    return value.fill(row)


def _json_cell(value: Any, column: str) -> Any:
    if is_empty(value):
        return None
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise InvalidRequest(f'Column {column!r} is not JSON: write for example ["a", "b"] or 0.5.') from None


def _picture_cells(value: Any, wanted: Pictures, pictures: PictureCells) -> Any:
    if not wanted.is_list:
        return pictures.image(value, wanted.column)
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _json_cell(value, wanted.column)
    entries = value if isinstance(value, list) else [value]
    return [pictures.image(entry, wanted.column) for entry in entries]
