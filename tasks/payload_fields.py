"""Types of payloads' fields: texts, labels, images, metadata."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, StringConstraints, Tag

from .errors import ImageBlocked, JobError
from .image_sources import FORMS, image_url, is_inner_path
from .pictures import AtHand, Image, is_at_hand
from .protocol import END_OF_UTTERANCE, MAX_METADATA_BYTES, MAX_METADATA_DEPTH, MAX_TEXT_CHARS, RESERVED_TOKENS
from .validation import IN_UNION, PayloadModel, for_pydantic

_LINE_OR_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _checked_image_url(text: str) -> str:
    try:
        return image_url(text)
    except JobError as error:
        raise for_pydantic(error) from None


def _checked_path(path: str) -> str:
    if not is_inner_path(path):
        raise for_pydantic(
            ImageBlocked("The image's path leaves the image root: write it from there, without '..'.", detail="path")
        )
    return path


def _read_at_hand(value: Any) -> Any:
    """A picture object as a `data:` URI; anything else unchanged."""
    if not is_at_hand(value):
        return value
    try:
        return Image.from_file(value)
    except JobError as error:
        raise for_pydantic(error) from None


def _checked_image(value: Any) -> Any:
    value = _read_at_hand(value)
    if isinstance(value, str):
        return _checked_image_url(value)
    if isinstance(value, ImagePath) or (isinstance(value, dict) and set(value) == {"path"}):
        return value
    raise ValueError(FORMS)


def _plain(text: str) -> str:
    """A text without control characters, which can hide a reserved token. Tabs and line ends stay; all line ends become
    newlines."""
    return _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def _without_control(label: str) -> str:
    if _LINE_OR_CONTROL.search(label):
        raise ValueError("a label is one line without control characters: remove them")
    return label


def without_tokens(tokens: tuple[str, ...]) -> AfterValidator:
    """A validator that refuses texts with one of these tokens."""
    return AfterValidator(functools.partial(_refuse_tokens, tokens))


def _refuse_tokens(tokens: tuple[str, ...], text: str) -> str:
    for token in tokens:
        if token in text:
            raise ValueError(f"the text holds {token}, which is reserved: remove it")
    return text


def refuse_tokens_in_pieces(tokens: tuple[str, ...], texts: Iterable[str | None]) -> None:
    """Refuse tokens that adjacent texts would form when the prompt joins them, stripped. None stands for an image."""
    _refuse_tokens(tokens, "".join("\n" if text is None else text.strip(" ") for text in texts))


if TYPE_CHECKING:
    ImageUrl: TypeAlias = str | Image | AtHand
else:
    ImageUrl = Annotated[str, BeforeValidator(_read_at_hand), AfterValidator(_checked_image_url)]

Text = Annotated[
    str,
    StringConstraints(max_length=MAX_TEXT_CHARS),
    AfterValidator(_plain),
    without_tokens((*RESERVED_TOKENS, END_OF_UTTERANCE)),
]
#: May have `<end_of_utterance>`, which the guide's lists for instruct models contain.
RawText = Annotated[
    str, StringConstraints(max_length=MAX_TEXT_CHARS), AfterValidator(_plain), without_tokens(RESERVED_TOKENS)
]
#: Refused if it has control characters, not stripped: the answer is one of the labels exactly as sent.
Label = Annotated[
    str,
    StringConstraints(min_length=1, max_length=200),
    AfterValidator(_without_control),
    Field(json_schema_extra={"pattern": r"^[^\x00-\x1f\x7f-\x9f]*$"}),
]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=200)]


def checked_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """The same metadata. Raises ValueError if it is too large or not JSON."""
    try:
        size = len(json.dumps(metadata, allow_nan=False))
        # A lone surrogate, which no result could return, raises here.
        json.dumps(metadata, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):
        raise ValueError("metadata holds what JSON cannot represent") from None
    if is_deeper(metadata, MAX_METADATA_DEPTH):
        raise ValueError(f"metadata is nested more than {MAX_METADATA_DEPTH} deep")
    if size > MAX_METADATA_BYTES:
        raise ValueError(f"metadata has more than {MAX_METADATA_BYTES} bytes as JSON")
    return metadata


def is_deeper(value: Any, most: int) -> bool:
    """Whether lists and objects in a JSON value are nested more than `most` deep, itself included."""
    level = [value]
    for _ in range(most):
        inner = (entry for outer in level for entry in (outer.values() if isinstance(outer, dict) else outer))
        level = [entry for entry in inner if isinstance(entry, dict | list | tuple)]
    return bool(level)


class ImagePath(PayloadModel):
    """A file below the operator's IDEFICS_IMAGE_ROOT, which is off by default."""

    path: Annotated[str, AfterValidator(_checked_path)] = Field(min_length=1, max_length=4096)


#: A checked image of a payload.
CheckedImage: TypeAlias = str | ImagePath

if TYPE_CHECKING:
    # The accepted types. `Image` is the type for fields of your own models.
    ImageSource: TypeAlias = CheckedImage | Image | AtHand
    ImageSources: TypeAlias = Sequence[ImageSource]
else:
    ImageSource = Annotated[
        Annotated[str, Tag(IN_UNION)] | Annotated[ImagePath, Tag(f"{IN_UNION}path")],
        Discriminator(lambda image: IN_UNION if isinstance(image, str) else f"{IN_UNION}path"),
        BeforeValidator(_checked_image),
        Field(description="An http(s) URL, a data: URI, or a path below the worker's image root."),
    ]
    ImageSources = list[ImageSource]
