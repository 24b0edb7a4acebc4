"""What a campaign asks of each row, and which columns its answers become. Pure but for the pictures that are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from ..errors import IdeficsError, InvalidRequest, JobError
from ..payloads import PAYLOADS, Job, parse
from ..results import Result
from ..validation import refusal
from .errors import PlanError, nearest
from .outcome_columns import Getter, check_clashes, field_of, outcome_fields
from .picture_cells import PictureCells
from .templates import Template, empty, is_empty, text_of
from .values import Pictures, Value, columns_of, filled, takes_pictures, value_of

_PREFIX = "idefics."
#: Fields that a campaign sets itself.
_OWN = {
    "idempotency_key": "a campaign runs each row once anyway",
    "response_model": "it is for Python: set response_format",
}
_A_URL = "https://example.com/a.jpg"
#: Stand for what only a row can say, while the constant fields are checked.
_STAND_INS: dict[str, Any] = {
    "image": _A_URL,
    "images": [_A_URL],
    "question": "?",
    "labels": ["a", "b"],
    "prompt": ["?"],
    "messages": [{"role": "user", "content": "?"}],
}


@dataclass(frozen=True)
class Plan:
    """A campaign's options. `check` them against the input's columns before anything is sent."""

    #: `caption`, or `idefics.caption`.
    task: str
    #: The column with the picture; None if `set` says where it is.
    image: str | None = None
    #: The column that identifies a row.
    id: str | None = None
    #: A payload's fields: templates over columns, or JSON with templates in it. A list's values may be several.
    set: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    #: Output columns by name, with the field of the result that each one holds.
    columns: Mapping[str, str] = field(default_factory=dict)
    #: A folder of the producer: cells with pictures may name files in it, which are sent inline.
    images_in: str | None = None
    #: Whether cells with pictures may name files below the workers' image root.
    image_paths: bool = False
    #: The encoding and the delimiter of an input that is a text; None: recognized.
    encoding: str | None = None
    delimiter: str | None = None

    def check(self, columns: Sequence[str]) -> None:
        """Raises PlanError, with the cure, if the plan is wrong or does not fit the input's columns."""
        known = set(columns)
        for name in (self.image, self.id):
            if name is not None and name not in known:
                raise _no_column(name, columns)
        for value in self._values.values():
            for name in columns_of(value):
                if name not in known:
                    raise _no_column(name, columns)
        self._pictures.check()
        self._check_constants()
        check_clashes(self._outcome_fields, columns)
        assert self._getters

    def job(self, row: Mapping[str, Any]) -> Job:
        """The job of a row. Raises InvalidRequest, or an error of its picture, with the column and the cure."""
        arguments: dict[str, Any] = {}
        for name, value in self._values.items():
            found = filled(value, row, self._pictures if name in self._picture_fields else None)
            if found is not None:
                arguments[name] = found
            elif self._payload.model_fields[name].is_required():
                raise empty(next(columns_of(value)))
        try:
            return parse(self._payload.task, arguments)
        except JobError as error:
            raise self._with_column(error) from None

    def row_id(self, row: Mapping[str, Any]) -> str | None:
        """The row's id; None in a plan without one. Raises InvalidRequest if it is empty."""
        if self.id is None:
            return None
        if is_empty(row.get(self.id)):
            raise empty(self.id)
        return text_of(row[self.id], self.id)

    @property
    def needed_columns(self) -> list[str]:
        """The input's columns that the jobs are made from."""
        found = [self.id] if self.id is not None else []
        found += [name for value in self._values.values() for name in columns_of(value)]
        return list(dict.fromkeys(found))

    # The output

    @property
    def outcome_columns(self) -> list[str]:
        """Names of the columns that the output gets beside the input's."""
        return list(self._outcome_fields)

    @property
    def outcome_types(self) -> dict[str, type]:
        """Their types: str, int, float, or object for any JSON."""
        return {name: kind for name, (_, kind) in self._getters.items()}

    def outcome(self, outcome: Result | IdeficsError) -> dict[str, Any]:
        """Their values for a row's result or error."""
        return {name: get(outcome) for name, (get, _) in self._getters.items()}

    # As JSON

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON, without options left at their defaults."""
        return {name: value for name, value in asdict(self).items() if value}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Plan:
        """A plan from `as_dict`. Raises PlanError for options that this version does not know."""
        known = {option.name for option in fields(cls)}
        for name in stored:
            if name not in known:
                raise PlanError(f"The plan has an unknown option {name!r}: a newer version wrote it.")
        try:
            return cls(**stored)
        except TypeError as error:
            raise PlanError(f"The plan is incomplete: {error}.") from None

    # What it comes to

    @cached_property
    def _payload(self) -> type[Job]:
        name = self.task if self.task.startswith(_PREFIX) else _PREFIX + self.task
        if name not in PAYLOADS:
            short = [known.removeprefix(_PREFIX) for known in PAYLOADS]
            raise PlanError(f"There is no task {self.task!r}.{nearest(self.task.removeprefix(_PREFIX), short)}")
        return PAYLOADS[name]

    @cached_property
    def _pictures(self) -> PictureCells:
        return PictureCells(self.images_in, self.image_paths)

    @cached_property
    def _values(self) -> dict[str, Value]:
        """Each field's value over a row. Raises PlanError for unknown and missing fields."""
        known = self._payload.model_fields
        for name in self.set:
            if name in _OWN:
                raise PlanError(f"{name} cannot be set: {_OWN[name]}.")
            if name not in known:
                raise PlanError(f"{self.task} has no field {name!r}.{nearest(name, set(known) - set(_OWN))}")
        values = {name: value_of(self._payload, name, given) for name, given in self.set.items()}
        if self.image is not None:
            values[self._image_field()] = Pictures(self.image, "images" in known)
        for name, one in known.items():
            if one.is_required() and name not in values:
                raise PlanError(f"{self.task} needs {name}: {_how(name)}.")
        return values

    @cached_property
    def _picture_fields(self) -> frozenset[str]:
        return frozenset(name for name in self._values if takes_pictures(self._payload, name))

    def _image_field(self) -> str:
        found = [name for name in ("image", "images") if name in self._payload.model_fields]
        if not found:
            name = "messages" if "messages" in self._payload.model_fields else "prompt"
            raise PlanError(f"{self.task} takes pictures in {name}: {_how(name)}.")
        if found[0] in self.set:
            raise PlanError(f"The picture is given twice, as --image and as --set {found[0]}: leave one out.")
        return found[0]

    def _check_constants(self) -> None:
        """Raises PlanError if a field that is the same in every row is wrong: all rows would fail."""
        arguments: dict[str, Any] = {}
        constants = set()
        for name, value in self._values.items():
            if not any(columns_of(value)):
                constants.add(name)
                arguments[name] = filled(value, {}, self._pictures)
            elif self._payload.model_fields[name].is_required():
                arguments[name] = "?" if isinstance(value, Template) and name != "image" else _STAND_INS[name]
        try:
            self._payload.model_validate(arguments)
        except ValidationError as error:
            if any(not fault["loc"] or fault["loc"][0] in constants for fault in error.errors(include_url=False)):
                told = str(refusal(error)).removeprefix("payload: ")
                raise PlanError(f"--set {told}") from None

    def _with_column(self, error: JobError) -> JobError:
        """The same error, naming the columns that the wrong field is made from."""
        wrong = str(error).partition(":")[0].partition(".")[0]
        among = [wrong] if wrong in self._values else [] if isinstance(error, InvalidRequest) else ["image", "images"]
        columns = [name for field in among if field in self._values for name in columns_of(self._values[field])]
        if not columns:
            return error
        which = " and ".join(map(repr, dict.fromkeys(columns)))
        return type(error)(f"Column {which}: {error}", detail=error.detail)

    @cached_property
    def _outcome_fields(self) -> dict[str, str]:
        return outcome_fields("labels" in self._payload.model_fields, self.columns)

    @cached_property
    def _getters(self) -> dict[str, tuple[Getter, type]]:
        return {name: field_of(path) for name, path in self._outcome_fields.items()}


def _no_column(name: str, columns: Sequence[str]) -> PlanError:
    return PlanError(f"The input has no column {name!r}.{nearest(name, columns)}")


def _how(field: str) -> str:
    """How a required field is given."""
    return {
        "image": "name its column with --image",
        "images": "name its column with --image",
        "labels": """write --set 'labels=["a", "b"]'""",
        "prompt": """write --set 'prompt=[{"image": "{url}"}, "What is it?"]'""",
        "messages": (
            """write --set 'messages=[{"role": "user", "content": [{"type": "image_url", "image_url": """
            """{"url": "{url}"}}, {"type": "text", "text": "What is it?"}]}]'"""
        ),
    }.get(field, f"write --set {field}=TEXT, with columns as in {{name}}")


def assignments(texts: Iterable[str], option: str) -> dict[str, str | list[str]]:
    """`NAME=VALUE` texts of a command line; the values of a name that comes several times in a list.

    Raises PlanError.
    """
    found: dict[str, str | list[str]] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise PlanError(f"{option} {text!r} is not NAME=VALUE.")
        before = found.get(name)
        found[name] = value if before is None else [*([before] if isinstance(before, str) else before), value]
    return found
