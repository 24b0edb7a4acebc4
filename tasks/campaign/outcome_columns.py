"""The columns that an output gets beside the input's: which field of a job's outcome each one holds. Pure."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, Union, get_args, get_origin

from pydantic import BaseModel

from ..errors import IdeficsError
from ..results import Result
from .errors import PlanError, nearest

#: Takes a field's value from a Result or an error; None where it has none.
Getter: TypeAlias = Callable[[Result | IdeficsError], Any]


def _of_result(get: Callable[[Result], Any]) -> Getter:
    return lambda outcome: get(outcome) if isinstance(outcome, Result) else None


def _of_error(get: Callable[[IdeficsError], Any]) -> Getter:
    return lambda outcome: None if isinstance(outcome, Result) else get(outcome)


def _seconds(result: Result) -> float:
    timing = result.timing
    return round(timing.queued_s + timing.fetch_s + timing.wait_s + timing.generate_s, 6)


def _score(result: Result) -> float | None:
    return None if result.label is None else (result.scores or {}).get(result.label)


#: Fields with a short name: how each is read, and its type.
FIELDS: dict[str, tuple[Getter, type]] = {
    "text": (_of_result(lambda result: result.text), str),
    "label": (_of_result(lambda result: result.label), str),
    "score": (_of_result(_score), float),
    "confidence": (_of_result(lambda result: result.confidence), float),
    "finish_reason": (_of_result(lambda result: result.finish_reason), str),
    "prompt_tokens": (_of_result(lambda result: result.usage.prompt_tokens), int),
    "completion_tokens": (_of_result(lambda result: result.usage.completion_tokens), int),
    "seconds": (_of_result(_seconds), float),
    "error_code": (_of_error(lambda error: error.code), str),
    "error": (_of_error(str), str),
    "error_detail": (_of_error(lambda error: error.detail), str),
}
_ALWAYS = ("finish_reason", "prompt_tokens", "completion_tokens", "seconds", "error_code", "error")


def outcome_fields(is_classify: bool, renamed: Mapping[str, str]) -> dict[str, str]:
    """The field of each output column, in order. A column for a field that has one by default takes its place."""
    chosen: dict[str, str] = {}
    for field in (*(("label", "score") if is_classify else ("text",)), *_ALWAYS):
        names = [name for name, source in renamed.items() if source == field] or [field]
        for name in names:
            if name in chosen:
                raise _twice(name)
            chosen[name] = field
    for name, field in renamed.items():
        if chosen.setdefault(name, field) != field:
            raise _twice(name)
    return chosen


def _twice(name: str) -> PlanError:
    return PlanError(f"Two columns of the output would be called {name!r}: write --column OTHER_NAME=FIELD.")


def check_clashes(fields: Mapping[str, str], columns: Sequence[str]) -> None:
    """Raises PlanError for a name that the input has too."""
    for name in columns:
        if name in fields:
            field = fields[name]
            raise PlanError(
                f"The input has a column {name!r} already: name the output's another, as in "
                f"--column answer_{field.replace('.', '_')}={field}."
            )


def field_of(path: str) -> tuple[Getter, type]:
    """How the field at a path is read, and its type: str, int, float, or object for any JSON. Raises PlanError."""
    if path in FIELDS:
        return FIELDS[path]
    if path.split(".")[0] == "parsed":
        # The text as JSON, of a job with a response_format.
        return _of_result(lambda result: _at(_json(result.text), path.split(".")[1:])), object
    names, kind = _resolved(path)
    return _of_result(lambda result: _at(result, names)), kind if kind in (str, int, float) else object


def _resolved(path: str) -> tuple[list[str], Any]:
    """The names along a path through a Result, and the type at its end."""
    names = path.split(".")
    kind: Any = Result
    for depth, name in enumerate(names):
        if get_origin(kind) is dict:
            entry = get_args(kind)[1]
            # A key of scores is a label, which may have dots itself.
            return ([*names[:depth], ".".join(names[depth:])], entry) if entry is not Any else (names, object)
        known = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}
        if name not in known:
            raise PlanError(
                f"--column: a result has no field {path!r}.{nearest(path, {**FIELDS, **Result.model_fields})}"
            )
        kind = _not_optional(known[name].annotation)
    return names, kind


def _not_optional(annotation: Any) -> Any:
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return next(member for member in members if member is not types.NoneType)


def _json(text: str) -> Any:
    """A text as JSON; None for one that is cut."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _at(value: Any, names: Sequence[str]) -> Any:
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value
