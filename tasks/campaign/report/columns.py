"""Which columns of an output hold what: by the campaign's plan, or by their usual names where it is not known. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ...payloads import PAYLOADS
from ...pictures import is_at_hand
from ..outcome_columns import FIELDS, outcome_fields
from ..picture_cells import is_picture
from ..plan import Plan
from ..thumbnails import is_web

#: Names of columns that hold pictures, in the order in which they are looked for.
_PICTURE_NAMES = ("image", "image_url", "picture", "picture_url", "photo", "url", "img", "path", "file", "file_name")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".avif")
#: Rows that are looked at to find the column with pictures.
_FIRST_ROWS = 20


@dataclass(frozen=True)
class OutputColumns:
    """Names of columns by what they hold."""

    #: By a result's field, such as `text` or `score`.
    by_field: Mapping[str, str]
    image: str | None
    id: str | None
    #: All others, in order.
    others: tuple[str, ...]

    def value(self, row: Mapping[str, Any], field: str) -> Any:
        """A result's field in a row; None where the output has no such column."""
        name = self.by_field.get(field)
        return None if name is None else row.get(name)


def of_plan(plan: Plan, columns: Sequence[str]) -> OutputColumns:
    """The columns of an output whose plan is known."""
    task = plan.task if plan.task in PAYLOADS else f"idefics.{plan.task}"
    fields = outcome_fields("labels" in PAYLOADS[task].model_fields, plan.columns)
    # Of several columns with the same field the first one counts; the others are shown as they are.
    by_field: dict[str, str] = {}
    for name, field in fields.items():
        if name in columns:
            by_field.setdefault(field, name)
    return _complete(by_field, plan.image, plan.id, columns)


def guessed(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], image: str | None = None) -> OutputColumns:
    """The columns of an output alone. `image`: the one with pictures, where it is known."""
    by_field = {name: name for name in FIELDS if name in columns}
    rest = [name for name in columns if name not in by_field]
    first = list(islice(rows, _FIRST_ROWS))
    named = sorted(rest, key=lambda name: _PICTURE_NAMES.index(name.lower()) if name.lower() in _PICTURE_NAMES else 99)
    found = image or next((name for name in named if _holds_pictures(row.get(name) for row in first)), None)
    return _complete(by_field, found, "id" if "id" in rest else None, columns)


def _complete(by_field: Mapping[str, str], image: str | None, id: str | None, columns: Sequence[str]) -> OutputColumns:
    taken = {*by_field.values(), image, id}
    return OutputColumns(by_field, image, id, tuple(name for name in columns if name not in taken))


def _holds_pictures(values: Iterable[Any]) -> bool:
    told = [value for value in values if value not in (None, "")]
    return bool(told) and all(map(_may_be_picture, told))


def _may_be_picture(value: Any) -> bool:
    if not isinstance(value, str):
        return is_picture(value) or is_at_hand(value)
    return is_web(value) or value.startswith("data:image/") or value.lower().endswith(_SUFFIXES)
