"""JSON Schema of everything that is sent and received, for clients in other languages and for generated code."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .payloads import PAYLOADS
from .results import Result
from .webhooks import Event

#: The described types, by their names in the schema.
DESCRIBED: dict[str, type[BaseModel]] = {**PAYLOADS, "result": Result, "event": Event}


def schema() -> dict[str, Any]:
    """One JSON Schema document, with a property for each task's keyword arguments, the result and a callback's event.

    Each property refers to its definition in `$defs`.
    """
    references, document = models_json_schema([(model, "validation") for model in DESCRIBED.values()])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "IDEFICS Jobs",
        "description": (
            "The keyword arguments of each task; `result`, what a finished job returns; `event`, a callback's body "
            "with its `webhook-id` header as `id`."
        ),
        "type": "object",
        "properties": {name: references[model, "validation"] for name, model in DESCRIBED.items()},
        "$defs": _on_one_line(document["$defs"]),
    }


def _on_one_line(part: Any) -> Any:
    """The same schema, with each description on one line."""
    if isinstance(part, list):
        return [_on_one_line(entry) for entry in part]
    if not isinstance(part, dict):
        return part
    return {
        name: " ".join(value.split()) if name == "description" and isinstance(value, str) else _on_one_line(value)
        for name, value in part.items()
    }
