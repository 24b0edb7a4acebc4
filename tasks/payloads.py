"""The payloads of the six tasks.

A payload's fields are its Celery task's keyword arguments, as JSON. Both sides check them with these classes:
our client before it sends, the worker before it runs. A new task also needs its prompt (`worker/jobs/prompts.py`), a
new field of sampling its place in a row (`worker/jobs/row_builder.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from .chat_messages import ChatImagePart, ChatImageUrl, ChatMessage, ChatMessages, ChatPart, ChatTextPart
from .errors import ImageTooLarge, InvalidRequest
from .outcomes import Outcome
from .payload_fields import (
    CheckedImage,
    ImagePath,
    ImageSource,
    ImageSources,
    ImageUrl,
    Label,
    RawText,
    StopString,
    Text,
    checked_metadata,
    refuse_tokens_in_pieces,
    without_tokens,
)
from .pictures import Image
from .prompt_parts import ImagePart, Parts, TextPart, named_part, strings_too
from .protocol import (
    CALLBACK_QUEUE,
    CANCEL_TTL_S,
    DEFAULT_PRIORITY,
    END_OF_UTTERANCE,
    HIDDEN,
    MAX_ENTRIES,
    MAX_JOB_BYTES,
    MAX_LABELS,
    MAX_METADATA_BYTES,
    MAX_METADATA_DEPTH,
    MAX_TEXT_CHARS,
    QUEUE,
    RESERVED_TOKENS,
    SUBMITTED_AT,
)
from .response_format import Formatted, ResponseFormat
from .results import ModelInfo, Result, Timing, Usage
from .sampling_fields import NEAR_GREEDY, Sampled
from .urls import fault_of
from .validation import PayloadModel, refusal

#: Includes names that were defined here once and have their own modules now: producers may import them from here.
__all__ = [
    "CALLBACK_QUEUE",
    "CANCEL_TTL_S",
    "DEFAULT_PRIORITY",
    "END_OF_UTTERANCE",
    "HIDDEN",
    "MAX_ENTRIES",
    "MAX_JOB_BYTES",
    "MAX_LABELS",
    "MAX_METADATA_BYTES",
    "MAX_METADATA_DEPTH",
    "MAX_TEXT_CHARS",
    "NEAR_GREEDY",
    "PAYLOADS",
    "QUEUE",
    "RESERVED_TOKENS",
    "SUBMITTED_AT",
    "Answer",
    "AnswerExample",
    "Callback",
    "Caption",
    "CaptionExample",
    "Chat",
    "ChatImagePart",
    "ChatImageUrl",
    "ChatMessage",
    "ChatMessages",
    "ChatPart",
    "ChatTextPart",
    "CheckedImage",
    "Classify",
    "ClassifyExample",
    "Complete",
    "Image",
    "ImagePart",
    "ImagePath",
    "ImageSource",
    "ImageSources",
    "ImageUrl",
    "Job",
    "Label",
    "ModelInfo",
    "Outcome",
    "Parts",
    "RawText",
    "ResponseFormat",
    "Result",
    "StopString",
    "Text",
    "TextPart",
    "Timing",
    "Usage",
    "Write",
    "check_size",
    "checked_metadata",
    "parse",
]


def _checked_callback_url(text: str) -> str:
    if fault_of(text):
        raise ValueError("write https://host/path, without a user")
    return text


class Callback(PayloadModel):
    """Where the outcome is posted, signed with the worker's key of that id."""

    url: Annotated[str, AfterValidator(_checked_callback_url)] = Field(
        max_length=4096, json_schema_extra={"pattern": r"^https?://\S+$"}
    )
    """Public https URL that the event is posted to."""
    key_id: str = Field(min_length=1, max_length=100)
    """Id of the secret that signs it, one of the worker's IDEFICS_CALLBACK_KEYS."""
    events: list[Literal["job.succeeded", "job.failed", "job.canceled", "job.reviewed"]] = Field(
        default=[], max_length=4
    )
    """Events to be sent. Empty: all."""


class Job(Sampled):
    """The fields that every task takes."""

    #: The Celery task's name.
    task: ClassVar[str]

    max_new_tokens: int | None = Field(default=None, ge=1)
    """New tokens at most. Default: the worker's. More than the worker's maximum is refused."""
    stop: list[StopString] = Field(default=[], max_length=16)
    """Strings that end the text; it is cut before the first of them."""
    deadline_s: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """Seconds from submission. After it a job that has not started fails, and a running one ends with its text so
    far."""
    min_confidence: float | None = Field(default=None, ge=0.0, le=1.0)
    """Below this confidence the result says `abstained`, and the answer waits for a person (`idefics-jobs review`)."""
    stream: bool = False
    """Have workers write the text as it grows, for `job.watch()`. The result is the same."""
    callback: Callback | None = None
    """Where the outcome is posted, signed."""
    metadata: dict[str, Any] = {}
    """Any JSON object, returned in the result."""
    idempotency_key: str | None = Field(default=None, min_length=1, max_length=255)
    """Jobs with the same key and the same payload run once and share the result."""

    @model_validator(mode="before")
    @classmethod
    def _lists_are_bounded(cls, fields: Any) -> Any:
        # Before the entries are validated: a megabyte holds many.
        for name in cls.model_fields if isinstance(fields, dict) else ():
            entries = fields.get(name)
            if isinstance(entries, list) and len(entries) > MAX_ENTRIES:
                raise ValueError(f"{name} has {len(entries):,} entries: at most {MAX_ENTRIES:,} are taken")
        return fields

    @field_validator("metadata")
    @classmethod
    def _metadata_is_small(cls, metadata: dict[str, Any]) -> dict[str, Any]:
        return checked_metadata(metadata)

    def arguments(self) -> dict[str, Any]:
        """The Celery task's keyword arguments: JSON, without the fields left at their defaults."""
        return self.model_dump(mode="json", exclude_defaults=True)


class CaptionExample(PayloadModel):
    image: ImageSource
    text: Text


class Caption(Job):
    """Describe an image: freely, after a prompt, or in the form that examples show."""

    task = "idefics.caption"

    image: ImageSource
    prompt: Text | None = None
    """Beginning of the caption, which the answer continues."""
    examples: list[CaptionExample] = Field(default=[], max_length=MAX_ENTRIES)
    """Captioned images that show the form of the answer: `{"image": ..., "text": ...}`."""
    instruction: Text = "Describe this image."
    """What is asked of each image: with examples, and always by models with a chat template."""


class AnswerExample(PayloadModel):
    image: ImageSource
    question: Text
    answer: Text


class Answer(Formatted, Job):
    """Answer a question about an image."""

    task = "idefics.answer"

    image: ImageSource
    question: Text
    """The question about the image."""
    examples: list[AnswerExample] = Field(default=[], max_length=MAX_ENTRIES)
    """Answered questions: `{"image": ..., "question": ..., "answer": ...}`."""


class ClassifyExample(PayloadModel):
    image: ImageSource
    label: Text


class Classify(Job):
    """Choose one label for an image, with a probability for each."""

    task = "idefics.classify"

    image: ImageSource
    labels: list[Annotated[Label, without_tokens((*RESERVED_TOKENS, END_OF_UTTERANCE))]] = Field(
        min_length=2, max_length=MAX_LABELS
    )
    """Distinct labels; the answer is one of them."""
    examples: list[ClassifyExample] = Field(default=[], max_length=MAX_ENTRIES)
    """Classified images: `{"image": ..., "label": ...}`."""

    @field_validator("labels")
    @classmethod
    def _labels_are_distinct(cls, labels: list[str]) -> list[str]:
        spoken = [label.strip() for label in labels]
        if not all(spoken):
            raise ValueError("a label must not be blank")
        if len(set(spoken)) < len(labels):
            raise ValueError("the labels must be distinct, blanks around them apart")
        return labels

    @model_validator(mode="after")
    def _has_one_answer(self) -> Classify:
        if self.n > 1 or self.logprobs is not None:
            raise ValueError("n and logprobs do not go with labels: the result's scores has the probability of each")
        return self

    @property
    def spoken_labels(self) -> list[str]:
        """The labels as the model reads them; the answer has them as sent."""
        return [label.strip() for label in self.labels]


class Write(Formatted, Job):
    """Write a text that images guide: a story, an advert, a post."""

    task = "idefics.write"

    images: ImageSources = Field(min_length=1, max_length=MAX_ENTRIES)
    """One or more images."""
    instruction: Text = "Use the image to write a story."
    """What to write."""
    lead: Text = "Story:"
    """The line before the text."""


class Complete(Formatted, Job):
    """Continue a list of texts and images, exactly as the IDEFICS guide writes it.

    A string that is wholly an http(s) URL or a `data:image/` URI is an image; `{"image": ...}` and
    `{"text": ...}` say it outright.
    """

    task = "idefics.complete"

    prompt: Parts = Field(min_length=1, max_length=MAX_ENTRIES, json_schema_extra=strings_too)
    """Texts and images in order: strings, `{"text": ...}` or `{"image": ...}`."""

    @field_validator("prompt", mode="before")
    @classmethod
    def _strings_say_what_they_are(cls, prompt: Any) -> Any:
        if not isinstance(prompt, list):
            return prompt
        return [named_part(part) for part in prompt]

    @field_validator("prompt")
    @classmethod
    def _no_reserved_token_in_pieces(cls, prompt: list[ImagePart | TextPart]) -> list[ImagePart | TextPart]:
        refuse_tokens_in_pieces(RESERVED_TOKENS, (part.text if isinstance(part, TextPart) else None for part in prompt))
        return prompt


class Chat(Formatted, Job):
    """Answer the last of a conversation's messages (OpenAI's form). For instruct checkpoints."""

    task = "idefics.chat"

    messages: ChatMessages = Field(min_length=1, max_length=MAX_ENTRIES)
    """The conversation; the last message is the user's."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """OpenAI's name for `max_new_tokens`. A value above the worker's maximum is lowered to it, not refused."""

    @model_validator(mode="after")
    def _one_length(self) -> Chat:
        if self.max_new_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_new_tokens or max_completion_tokens, not both")
        return self

    @field_validator("messages")
    @classmethod
    def _the_user_speaks_last(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        if messages[-1].role != "user":
            raise ValueError("the last message must be the user's")
        return messages

    @field_validator("messages")
    @classmethod
    def _no_reserved_token_in_pieces(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        for message in messages:
            parts = message.content if isinstance(message.content, list) else []
            texts = (part.text if isinstance(part, ChatTextPart) else None for part in parts)
            refuse_tokens_in_pieces((*RESERVED_TOKENS, END_OF_UTTERANCE), texts)
        return messages


PAYLOADS: dict[str, type[Job]] = {
    payload.task: payload for payload in (Caption, Answer, Classify, Write, Complete, Chat)
}


def check_size(job: Job, most: int) -> None:
    """Raises InvalidRequest for a job with more bytes than `most`; ImageTooLarge if its pictures are the reason."""
    checked_size(job.arguments(), most)


def checked_size(arguments: dict[str, Any], most: int) -> int:
    """The bytes of a job's arguments as JSON. Raises as `check_size` does."""
    size = len(json.dumps(arguments))
    if size <= most:
        return size
    pictures = [len(uri) for uri in _data_uris(arguments)]
    # Base64 encodes three bytes as four characters.
    has, room = sum(pictures) * 3 // 4, (most - size + sum(pictures)) * 3 // 4
    if not pictures or room <= 0:
        raise InvalidRequest(f"The job has {size:,} bytes and may have {most:,}: send less.", detail="job_bytes")
    who = "The picture has" if len(pictures) == 1 else f"The {len(pictures)} pictures have"
    cure = "send it by URL, or scaled down" if len(pictures) == 1 else "send them by URL, fewer, or scaled down"
    raise ImageTooLarge(f"{who} {has:,} bytes and may have {room:,} in a job: {cure}.", detail="job_bytes")


def _data_uris(value: Any) -> Iterator[str]:
    """Pictures in a job's arguments."""
    if isinstance(value, str):
        yield from [value] if value[:5].lower() == "data:" else []
    elif isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _data_uris(entry)


def parse(task: str, arguments: dict[str, Any]) -> Job:
    """A task's keyword arguments as its payload.

    Raises InvalidRequest, with every wrong field named and no value repeated, or ImageBlocked. So does a payload's
    constructor; its error is pydantic's ValidationError too.
    """
    payload = PAYLOADS.get(task)
    if payload is None:
        raise InvalidRequest(f"There is no task {task!r}: use one of {', '.join(PAYLOADS)}.")
    try:
        return payload.model_validate(arguments)
    except ValidationError as error:
        raise refusal(error) from None
