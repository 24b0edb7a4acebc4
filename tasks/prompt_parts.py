"""Texts and images of a prompt to `idefics.complete`, as the IDEFICS guide writes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import Discriminator, Tag

from .image_sources import is_meant_as_image
from .payload_fields import ImageSource, RawText
from .pictures import is_at_hand
from .protocol import MAX_TEXT_CHARS
from .validation import IN_UNION, PayloadModel


class ImagePart(PayloadModel):
    image: ImageSource


class TextPart(PayloadModel):
    text: RawText


def _kind_of_part(part: Any) -> str | None:
    if isinstance(part, dict):
        return f"{IN_UNION}{'image' if 'image' in part else 'text'}"
    if isinstance(part, ImagePart | TextPart):
        return f"{IN_UNION}{'image' if isinstance(part, ImagePart) else 'text'}"
    return None


if TYPE_CHECKING:
    # Strings and dictionaries, too: the guide's lists as they are.
    Parts: TypeAlias = list[Any]
else:
    Parts = list[
        Annotated[
            Annotated[ImagePart, Tag(f"{IN_UNION}image")] | Annotated[TextPart, Tag(f"{IN_UNION}text")],
            Discriminator(
                _kind_of_part,
                custom_error_type="part",
                custom_error_message='a part is a string, {"image": ...} or {"text": ...}',
            ),
        ]
    ]


def strings_too(schema: dict[str, Any]) -> None:
    """Adds to a prompt's JSON Schema the plain strings that `named_part` turns into parts."""
    schema["items"] = {"anyOf": [{"type": "string", "maxLength": MAX_TEXT_CHARS}, schema["items"]]}


def named_part(part: Any) -> Any:
    """A string or a picture at hand as `{"text": ...}` or `{"image": ...}`; anything else as it is."""
    if isinstance(part, str):
        return {"image": part} if is_meant_as_image(part) else {"text": part}
    return {"image": part} if is_at_hand(part) else part
