"""The form that an answer must have: OpenAI's `response_format`, and a regular expression, a choice or a grammar.

What can be checked without the workers' library is checked here: sizes, depth, and that no `$ref` leads out of its
schema.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema

from .payload_fields import Label, is_deeper
from .protocol import MAX_FORMAT_BYTES, MAX_FORMAT_DEPTH, MAX_LABELS
from .validation import IN_UNION, PayloadModel

#: Keywords whose values are data: a `$ref` in them is none.
_DATA = {"const", "default", "enum", "examples"}


class JsonSchema(PayloadModel):
    # The field cannot be called `schema`, which is a method of pydantic's models.
    model_config = ConfigDict(serialize_by_alias=True)

    name: str = Field(default="answer", pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    """OpenAI's field, which changes nothing here."""
    description: str | None = None
    """OpenAI's field, which changes nothing here: the model does not read it."""
    schema_: dict[str, Any] = Field(alias="schema")
    """The schema. Each `$ref` leads within it (`#/$defs/...`): none is fetched."""
    strict: bool | None = None
    """OpenAI's field, which changes nothing here: every answer fits the schema."""

    @field_validator("schema_")
    @classmethod
    def _refers_to_itself(cls, schema: dict[str, Any]) -> dict[str, Any]:
        if is_deeper(schema, MAX_FORMAT_DEPTH):
            raise ValueError(f"the schema is nested more than {MAX_FORMAT_DEPTH} deep")
        if any(not reference.startswith("#") for reference in _references(schema)):
            raise ValueError("a $ref leads out of the schema: write it as #/$defs/..., since none is fetched")
        return schema


class JsonSchemaFormat(PayloadModel):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class JsonObjectFormat(PayloadModel):
    """Any JSON object."""

    type: Literal["json_object"]


class RegexFormat(PayloadModel):
    """A text that a regular expression matches as a whole."""

    type: Literal["regex"]
    regex: str = Field(min_length=1)


class ChoiceFormat(PayloadModel):
    """One of several texts."""

    type: Literal["choice"]
    choice: list[Label] = Field(min_length=1, max_length=MAX_LABELS)

    @field_validator("choice")
    @classmethod
    def _are_distinct(cls, choice: list[str]) -> list[str]:
        if any(text != text.strip() for text in choice):
            raise ValueError("a choice must not begin or end with a blank")
        if len(set(choice)) < len(choice):
            raise ValueError("the choices must be distinct")
        return choice


class GrammarFormat(PayloadModel):
    """A text of a context-free grammar in Lark's notation, whose first rule is `start`."""

    type: Literal["grammar"]
    grammar: str = Field(min_length=1)


_TYPES = ("json_schema", "json_object", "regex", "choice", "grammar")


def _type_of(form: Any) -> str | None:
    kind = form.get("type") if isinstance(form, dict) else getattr(form, "type", None)
    return f"{IN_UNION}{kind}" if kind in _TYPES else None


def _small(form: PayloadModel) -> PayloadModel:
    try:
        size = len(form.model_dump_json())
    except ValueError:
        # A lone surrogate.
        raise ValueError("it holds what JSON cannot represent") from None
    if size > MAX_FORMAT_BYTES:
        raise ValueError(f"it has {size:,} bytes as JSON: at most {MAX_FORMAT_BYTES:,} are taken")
    return form


ResponseFormat: TypeAlias = Annotated[
    Annotated[JsonSchemaFormat, Tag(f"{IN_UNION}json_schema")]
    | Annotated[JsonObjectFormat, Tag(f"{IN_UNION}json_object")]
    | Annotated[RegexFormat, Tag(f"{IN_UNION}regex")]
    | Annotated[ChoiceFormat, Tag(f"{IN_UNION}choice")]
    | Annotated[GrammarFormat, Tag(f"{IN_UNION}grammar")],
    Discriminator(
        _type_of,
        custom_error_type="response_format",
        custom_error_message='type is one of "json_schema", "json_object", "regex", "choice" and "grammar"',
    ),
    AfterValidator(_small),
]


class Formatted(PayloadModel):
    """The fields of jobs whose text may have a form."""

    response_format: ResponseFormat | None = None
    """The form that the text must have: OpenAI's `{"type": "json_schema", ...}` or `{"type": "json_object"}`, or
    `{"type": "regex", "regex": ...}`, `{"type": "choice", "choice": [...]}`, `{"type": "grammar", "grammar": ...}`."""
    response_model: SkipJsonSchema[type[BaseModel] | None] = Field(default=None, exclude=True)
    """In Python instead of `response_format`: a pydantic model, whose instance is then `result.parsed`."""

    @model_validator(mode="before")
    @classmethod
    def _format_of_model(cls, fields: Any) -> Any:
        model = fields.get("response_model") if isinstance(fields, dict) else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return fields
        if fields.get("response_format") is not None:
            raise ValueError("give response_format or response_model, not both")
        return {**fields, "response_format": format_of(model)}

    @field_validator("response_format", mode="before")
    @classmethod
    def _text_is_no_form(cls, form: Any) -> Any:
        return None if form == {"type": "text"} else form

    @model_validator(mode="after")
    def _a_form_needs_one_beam(self) -> Self:
        if self.response_format is not None and getattr(self, "num_beams", 1) > 1:
            raise ValueError("response_format needs num_beams 1: a beam search does not keep to a form")
        return self


def format_of(model: type[BaseModel]) -> dict[str, Any]:
    """The `response_format` of a pydantic model. Its objects have no other fields than the model's."""
    return {"type": "json_schema", "json_schema": {"schema": _closed(model.model_json_schema())}}


def _closed(schema: Any) -> Any:
    """A schema whose objects with `properties` have no others, unless they say something else."""
    if isinstance(schema, list):
        return [_closed(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: value if name in _DATA else _closed(value) for name, value in schema.items()}
    if isinstance(closed.get("properties"), dict) and closed.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed


def _references(schema: Any) -> Iterator[str]:
    entries = schema.items() if isinstance(schema, dict) else enumerate(schema) if isinstance(schema, list) else ()
    for name, value in entries:
        if name in ("$ref", "$dynamicRef", "$recursiveRef") and isinstance(value, str):
            yield value
        elif name not in _DATA:
            yield from _references(value)
