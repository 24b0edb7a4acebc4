"""A model's JSON Schema describes its fields as pydantic's own `use_attribute_docstrings` would."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field

from tasks.described_model import DescribedModel


class _Stock(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


def _models(base: type[BaseModel]) -> list[type[BaseModel]]:
    """The same models on a base."""

    class Part(base):  # type: ignore[valid-type, misc]
        """A part."""

        size: int = 1
        """Its size,
        in pixels."""
        plain: int = 2

    class Whole(Part):
        part: Part
        """What it is made of."""
        named: str = Field(alias="nameD", default="")
        """By another name."""
        told: str = Field(default="", description="Told.")
        """Not told."""
        plain: int = 3
        """Declared again."""
        size: str = ""  # type: ignore[assignment]

    Whole.model_rebuild(_types_namespace={"Part": Part})
    return [Part, Whole]


@pytest.mark.parametrize("mode", ["validation", "serialization"])
def test_a_schema_has_the_descriptions_that_pydantic_gives(mode: Any) -> None:
    ours, stock = ([model.model_json_schema(mode=mode) for model in _models(base)] for base in (DescribedModel, _Stock))
    assert ours == stock
    assert ours[1]["properties"]["plain"]["description"] == "Declared again."


def test_a_class_without_source_has_a_schema() -> None:
    made: dict[str, Any] = {"base": DescribedModel, "__name__": "nowhere"}
    exec("class Made(base):\n    size: int\n    'Its size.'", made)
    assert made["Made"].model_json_schema()["properties"] == {"size": {"title": "Size", "type": "integer"}}
