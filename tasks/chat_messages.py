"""Messages of a conversation, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Tag, model_validator

from .openai_form import plain_message
from .payload_fields import ImageUrl, Text
from .validation import IN_UNION, PayloadModel


class ChatImageUrl(PayloadModel):
    url: ImageUrl
    detail: Literal["auto", "low", "high", "original"] = "auto"
    """Accepted for OpenAI's clients and ignored: the model has one resolution."""


class ChatImagePart(PayloadModel):
    type: Literal["image_url"]
    image_url: ChatImageUrl


class ChatTextPart(PayloadModel):
    type: Literal["text"]
    text: Text


def _kind_of_chat_part(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return f"{IN_UNION}{kind}" if kind in ("text", "image_url") else None


ChatPart = Annotated[
    Annotated[ChatTextPart, Tag(f"{IN_UNION}text")] | Annotated[ChatImagePart, Tag(f"{IN_UNION}image_url")],
    Discriminator(
        _kind_of_chat_part,
        custom_error_type="part",
        custom_error_message='type is one of "text" and "image_url": a part is {"type": "text", "text": ...} or '
        '{"type": "image_url", "image_url": {"url": ...}} (a video is not read: send some of its frames as images)',
    ),
]


class ChatMessage(PayloadModel):
    role: Literal["system", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag(f"{IN_UNION}text")] | Annotated[list[ChatPart], Tag(f"{IN_UNION}parts")],
        Discriminator(lambda content: f"{IN_UNION}{'parts' if isinstance(content, list) else 'text'}"),
    ]

    @model_validator(mode="before")
    @classmethod
    def _in_plain_form(cls, message: Any) -> Any:
        return plain_message(message)


if TYPE_CHECKING:
    ChatMessages: TypeAlias = Sequence[ChatMessage | Mapping[str, Any]]
else:
    ChatMessages = list[ChatMessage]
