"""The base of payloads, and the conversion of their validation errors to our own errors.

The payloads, and `parse`, which checks one, are in `payloads.py`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from .described_model import DescribedModel
from .errors import ImageBlocked, ImageInvalid, ImageTooLarge, InvalidRequest, JobError

_NAME = re.compile(r"[A-Za-z_-]{1,40}")
#: Prefix of the names of a union's members, by which they are removed from an error's location.
IN_UNION = "<union>"
#: Errors of a picture, by pydantic's error type, which is the code of the job's error.
_PICTURE_ERRORS: dict[str, type[JobError]] = {
    error.code: error for error in (ImageBlocked, ImageInvalid, ImageTooLarge)
}


class _BadFields(ValidationError):
    """Raised by a payload's constructor for wrong fields: pydantic's error and one of ours at once."""

    detail: str | None

    def __init__(self, *args: Any) -> None:
        """Its arguments are set by `_bad_fields`; these are pydantic's."""


def _also_bad_fields(kind: type[JobError]) -> type[_BadFields]:
    # With the same name, since it is stored if a producer's own task ends with it.
    return type(kind.__name__, (kind, _BadFields), {"__init__": _BadFields.__init__})


_BAD_FIELDS: dict[type[JobError], type[_BadFields]] = {
    kind: _also_bad_fields(kind) for kind in (InvalidRequest, ImageBlocked, ImageInvalid, ImageTooLarge)
}


def _bad_fields(error: ValidationError) -> _BadFields:
    told = refusal(error)
    faults = [
        InitErrorDetails(type=PydanticCustomError(fault["type"], fault["msg"]), loc=fault["loc"], input=fault["input"])
        for fault in error.errors(include_url=False)
    ]
    bad = _BAD_FIELDS[type(told)].from_exception_data(error.title, faults, hide_input=True)
    bad.args, bad.detail = told.args, told.detail
    return bad


class PayloadModel(DescribedModel):
    """The base of payloads and of their parts: frozen, unknown fields refused."""

    # Messages without inputs: prompts and signed URLs must not reach logs.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    if not TYPE_CHECKING:

        def __init__(self, /, **fields: Any) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as error:
                raise _bad_fields(error) from None

        # As a part of another model, such as a web framework's, it is validated without this constructor.
        __init__.__pydantic_base_init__ = True


def for_pydantic(error: JobError) -> PydanticCustomError:
    """An error that pydantic collects in any model, also a web framework's; our own exception would pass through."""
    return PydanticCustomError(error.code, "{message}", {"message": str(error), "detail": error.detail})


def refusal(error: ValidationError) -> JobError:
    """The JobError for a payload's faults: that of a picture, else the first ten fields."""
    faults = error.errors(include_url=False, include_input=False)
    for fault in faults:
        if kind := _PICTURE_ERRORS.get(fault["type"]):
            return kind(fault["msg"], detail=fault.get("ctx", {}).get("detail"))
    return InvalidRequest("; ".join(map(_told, faults[:10])))


def _named(place: int | str) -> str:
    """A field's name, shortened and escaped if needed: an unknown field may have any name."""
    return str(place) if isinstance(place, int) or _NAME.fullmatch(place) else "(a field)"


def _told(fault: ErrorDetails) -> str:
    places = (place for place in fault["loc"] if not str(place).startswith(IN_UNION))
    where = ".".join(map(_named, places)) or "payload"
    return f"{where}: {fault['msg'].removeprefix('Value error, ')}"
