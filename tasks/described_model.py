"""A model whose JSON Schema describes each field by the docstring below it.

pydantic's `use_attribute_docstrings` does that too, but reads the sources when the classes are made: that took half of
the time to import this package, and more in a process with thousands of modules.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, GetJsonSchemaHandler
from pydantic_core import CoreSchema


class DescribedModel(BaseModel):
    """A base of models. The docstrings are read when a JSON Schema is made."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler, /) -> dict[str, Any]:
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for name, field in cls.model_fields.items():
            written = _docstring(cls, name)
            if written and field.description is None and (field.alias or name) in properties:
                properties[field.alias or name]["description"] = written
        return schema


def _docstring(model: type, field: str) -> str | None:
    """What stands below a field, where it was declared last."""
    declared = (base for base in model.__mro__ if field in vars(base).get("__annotations__", {}))
    return _docstrings(next(declared, model)).get(field)


@functools.cache
def _docstrings(model: type) -> dict[str, str]:
    """The docstrings of the fields that a class declares itself. Empty for a class without readable source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(model)))
    except (OSError, TypeError, SyntaxError):
        return {}
    return {
        declared.target.id: inspect.cleandoc(text.value.value)
        for declared, text in pairwise(tree.body[0].body)  # type: ignore[attr-defined]
        if isinstance(declared, ast.AnnAssign)
        and isinstance(declared.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
