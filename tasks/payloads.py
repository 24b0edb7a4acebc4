"""What a producer sends and what it gets back: the payloads of the six tasks and their result.

A payload's fields are its Celery task's keyword arguments, as JSON. Both sides check them with these classes:
our client before it sends, the worker before it runs.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from .errors import ImageBlocked, ImageInvalid, ImageTooLarge, InvalidRequest, JobCanceled, JobError
from .image_sources import FORMS, image_url, is_inner_path, is_meant_as_image
from .openai_form import plain_message
from .pictures import AtHand, is_at_hand
from .pictures import Image as Image
from .urls import fault_of

#: The queue that the workers read.
QUEUE = "idefics"
#: The callbacks worker's.
CALLBACK_QUEUE = "idefics.callbacks"
#: Celery on Redis: 0 is first and 9 last.
DEFAULT_PRIORITY = 5
#: The message header with the producer's clock (unix seconds) at submission.
SUBMITTED_AT = "idefics_submitted_at"
#: What logs, events and monitors show of a job's arguments: no prompt, no signed URL. Celery's options.
HIDDEN = {"argsrepr": "()", "kwargsrepr": "{...}"}
#: Seconds that the key of a cancellation stays (tasks/redis_keys.py): longer than a job waits, for its `eta` too.
CANCEL_TTL_S = 32 * 86_400

MAX_TEXT_CHARS = 200_000
MAX_LABELS = 1_000
MAX_METADATA_BYTES = 16_384
#: Lists and objects inside one another.
MAX_METADATA_DEPTH = 32
#: Entries of any list of a payload: examples, images, messages, parts.
MAX_ENTRIES = 1_000
#: A job's arguments as JSON. The worker's default IDEFICS_MAX_JOB_BYTES, less what Celery adds.
MAX_JOB_BYTES = 31_900_000

END_OF_UTTERANCE = "<end_of_utterance>"
#: A user's text with one of these would become the real token and change what other images mean.
RESERVED_TOKENS = ("<image>", "<fake_token_around_image>", "<s>", "</s>", "<unk>", "<pad>")

_NAME = re.compile(r"[A-Za-z_-]{1,40}")
_LINE_OR_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
#: How the names of a union's members begin, so that they do not stand among the fields of an error's place.
_IN_UNION = "<union>"

#: Temperatures below are 0. They would take the likeliest token anyway, by numbers that overflow on the way.
NEAR_GREEDY = 1e-5


def _greedy_near_zero(temperature: float) -> float:
    return temperature if temperature >= NEAR_GREEDY else 0.0


#: Errors of a picture, as pydantic's errors are called: the code of the error that a job would end in.
_PICTURE_ERRORS: dict[str, type[JobError]] = {
    error.code: error for error in (ImageBlocked, ImageInvalid, ImageTooLarge)
}


class _BadFields(ValidationError):
    """What is raised where a payload is built with wrong fields: pydantic's own error and one of ours at once."""

    detail: str | None

    def __init__(self, *args: Any) -> None:
        """Its arguments are set by `_bad_fields`; these are pydantic's."""


def _also_bad_fields(kind: type[JobError]) -> type[_BadFields]:
    # Of the same name: where a producer's own task ends with one, it is stored.
    return type(kind.__name__, (kind, _BadFields), {"__init__": _BadFields.__init__})


_BAD_FIELDS: dict[type[JobError], type[_BadFields]] = {
    kind: _also_bad_fields(kind) for kind in (InvalidRequest, ImageBlocked, ImageInvalid, ImageTooLarge)
}


def _bad_fields(error: ValidationError) -> _BadFields:
    told = _refusal(error)
    faults = [
        InitErrorDetails(type=PydanticCustomError(fault["type"], fault["msg"]), loc=fault["loc"], input=fault["input"])
        for fault in error.errors(include_url=False)
    ]
    bad = _BAD_FIELDS[type(told)].from_exception_data(error.title, faults, hide_input=True)
    bad.args, bad.detail = told.args, told.detail
    return bad


class _Frozen(BaseModel):
    # Inputs stay out of messages: prompts and signed URLs must not reach logs.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, use_attribute_docstrings=True)

    if not TYPE_CHECKING:

        def __init__(self, /, **fields: Any) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as error:
                raise _bad_fields(error) from None

        # As a part of another model, a web framework's for one, it is validated without this.
        __init__.__pydantic_base_init__ = True


def _checked_image_url(text: str) -> str:
    try:
        return image_url(text)
    except JobError as error:
        raise _for_pydantic(error) from None


def _checked_path(path: str) -> str:
    if not is_inner_path(path):
        raise _for_pydantic(
            ImageBlocked("The image's path leaves the image root: write it from there, without '..'.", detail="path")
        )
    return path


def _for_pydantic(error: JobError) -> PydanticCustomError:
    """A validation error also of a web framework's models, from which an exception of ours would escape."""
    return PydanticCustomError(error.code, "{message}", {"message": str(error), "detail": error.detail})


def _read_at_hand(value: Any) -> Any:
    """A picture that the producer has, as a `data:` URI; anything else as it is."""
    if not is_at_hand(value):
        return value
    try:
        return Image.from_file(value)
    except JobError as error:
        raise _for_pydantic(error) from None


def _checked_callback_url(text: str) -> str:
    if fault_of(text):
        raise ValueError("write https://host/path, without a user")
    return text


def _checked_image(value: Any) -> Any:
    value = _read_at_hand(value)
    if isinstance(value, str):
        return _checked_image_url(value)
    if isinstance(value, ImagePath) or (isinstance(value, dict) and set(value) == {"path"}):
        return value
    raise ValueError(FORMS)


def _plain(text: str) -> str:
    """Without control characters, which say nothing and can hide a reserved token. Tabs and line ends stay: those of
    DOS and of old Macs become newlines."""
    return _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def _without_control(label: str) -> str:
    if _LINE_OR_CONTROL.search(label):
        raise ValueError("a label is one line without control characters: remove them")
    return label


def _without(tokens: tuple[str, ...]) -> AfterValidator:
    return AfterValidator(functools.partial(_refuse_tokens, tokens))


def _refuse_tokens(tokens: tuple[str, ...], text: str) -> str:
    for token in tokens:
        if token in text:
            raise ValueError(f"the text holds {token}, which is reserved: remove it")
    return text


def _refuse_tokens_in_pieces(tokens: tuple[str, ...], texts: Iterable[str | None]) -> None:
    """Texts that follow one another are joined in the prompt, without outer blanks; None stands for an image."""
    _refuse_tokens(tokens, "".join("\n" if text is None else text.strip(" ") for text in texts))


if TYPE_CHECKING:
    ImageUrl: TypeAlias = str | Image | AtHand
else:
    ImageUrl = Annotated[str, BeforeValidator(_read_at_hand), AfterValidator(_checked_image_url)]

Text = Annotated[
    str,
    StringConstraints(max_length=MAX_TEXT_CHARS),
    AfterValidator(_plain),
    _without((*RESERVED_TOKENS, END_OF_UTTERANCE)),
]
#: The guide's own lists for instruct models spell out `<end_of_utterance>`.
RawText = Annotated[
    str, StringConstraints(max_length=MAX_TEXT_CHARS), AfterValidator(_plain), _without(RESERVED_TOKENS)
]
#: Refused with control characters, not stripped of them: the answer is one of the labels as they were sent.
Label = Annotated[
    str,
    StringConstraints(min_length=1, max_length=200),
    AfterValidator(_without_control),
    Field(json_schema_extra={"pattern": r"^[^\x00-\x1f\x7f-\x9f]*$"}),
]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=200)]


def checked_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """The same, if it is small and can be said in JSON. Raises ValueError otherwise."""
    try:
        size = len(json.dumps(metadata, allow_nan=False))
        # Half a surrogate pair, which no result could carry back, raises here.
        json.dumps(metadata, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):
        raise ValueError("metadata holds what JSON cannot say") from None
    if _is_deeper(metadata, MAX_METADATA_DEPTH):
        raise ValueError(f"metadata is nested more than {MAX_METADATA_DEPTH} deep")
    if size > MAX_METADATA_BYTES:
        raise ValueError(f"metadata has more than {MAX_METADATA_BYTES} bytes as JSON")
    return metadata


def _is_deeper(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        inner = (entry for outer in level for entry in (outer.values() if isinstance(outer, dict) else outer))
        level = [entry for entry in inner if isinstance(entry, dict | list | tuple)]
    return bool(level)


class ImagePath(_Frozen):
    """A file below the operator's IDEFICS_IMAGE_ROOT, which is off by default."""

    path: Annotated[str, AfterValidator(_checked_path)] = Field(min_length=1, max_length=4096)


#: An image of a payload: whatever it was made of, it holds one of these.
CheckedImage: TypeAlias = str | ImagePath

if TYPE_CHECKING:
    # What may be given. `Image` is the type of a field in a request's model of yours.
    ImageSource: TypeAlias = CheckedImage | Image | AtHand
    ImageSources: TypeAlias = Sequence[ImageSource]
else:
    ImageSource = Annotated[
        Annotated[str, Tag(_IN_UNION)] | Annotated[ImagePath, Tag(f"{_IN_UNION}path")],
        Discriminator(lambda image: _IN_UNION if isinstance(image, str) else f"{_IN_UNION}path"),
        BeforeValidator(_checked_image),
        Field(description="An http(s) URL, a data: URI, or a path below the worker's image root."),
    ]
    ImageSources = list[ImageSource]


class Callback(_Frozen):
    """Where the outcome is posted, signed with the worker's key of that id."""

    url: Annotated[str, AfterValidator(_checked_callback_url)] = Field(
        max_length=4096, json_schema_extra={"pattern": r"^https?://\S+$"}
    )
    """Public https URL that the event is posted to."""
    key_id: str = Field(min_length=1, max_length=100)
    """Id of the secret that signs it, one of the worker's IDEFICS_CALLBACK_KEYS."""
    events: list[Literal["job.succeeded", "job.failed", "job.canceled"]] = Field(default=[], max_length=3)
    """Events to be sent. Empty: all three."""


class Job(_Frozen):
    """The fields that every task takes."""

    #: The Celery task's name.
    task: ClassVar[str]

    max_new_tokens: int | None = Field(default=None, ge=1)
    """New tokens at most. Default: the worker's. More than the worker's maximum is refused."""
    num_beams: int = Field(default=1, ge=1, le=16)
    """Beams of the search. More than one requires temperature 0."""
    temperature: Annotated[float, AfterValidator(_greedy_near_zero)] = Field(default=0.0, ge=0.0, le=10.0)
    """0: greedy decoding; so is a value below 0.00001. Above: sampling."""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    """Sample from the most likely tokens whose probabilities add up to this. Default: the checkpoint's, else 1."""
    top_k: int | None = Field(default=None, ge=0, le=1_000_000)
    """Sample from this many most likely tokens; 0: from all. Default: the checkpoint's, else all. (The default of 50 in
    transformers is not used.)"""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Makes sampling reproducible."""
    stop: list[StopString] = Field(default=[], max_length=16)
    """Strings that end the text; it is cut before the first of them."""
    deadline_s: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """Seconds from submission. After it a job that has not started fails, and a running one ends with its text so
    far."""
    callback: Callback | None = None
    """Where the outcome is posted, signed."""
    metadata: dict[str, Any] = {}
    """Any JSON object, returned in the result."""
    idempotency_key: str | None = Field(default=None, min_length=1, max_length=255)
    """Jobs with the same key and the same payload run once and share the result."""

    @model_validator(mode="before")
    @classmethod
    def _lists_are_bounded(cls, fields: Any) -> Any:
        # Before anybody looks at the entries, of which a megabyte holds many.
        for name in cls.model_fields if isinstance(fields, dict) else ():
            entries = fields.get(name)
            if isinstance(entries, list) and len(entries) > MAX_ENTRIES:
                raise ValueError(f"{name} has {len(entries):,} entries: at most {MAX_ENTRIES:,} are taken")
        return fields

    @field_validator("metadata")
    @classmethod
    def _metadata_is_small(cls, metadata: dict[str, Any]) -> dict[str, Any]:
        return checked_metadata(metadata)

    @model_validator(mode="after")
    def _sampling_is_one_of_beams_or_temperature(self) -> Job:
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError("num_beams above 1 needs temperature 0: beams and sampling do not go together")
        return self

    def arguments(self) -> dict[str, Any]:
        """The Celery task's keyword arguments: JSON, without the fields left at their defaults."""
        return self.model_dump(mode="json", exclude_defaults=True)


class CaptionExample(_Frozen):
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


class AnswerExample(_Frozen):
    image: ImageSource
    question: Text
    answer: Text


class Answer(Job):
    """Answer a question about an image."""

    task = "idefics.answer"

    image: ImageSource
    question: Text
    """The question about the image."""
    examples: list[AnswerExample] = Field(default=[], max_length=MAX_ENTRIES)
    """Answered questions: `{"image": ..., "question": ..., "answer": ...}`."""


class ClassifyExample(_Frozen):
    image: ImageSource
    label: Text


class Classify(Job):
    """Choose one label for an image, with a probability for each."""

    task = "idefics.classify"

    image: ImageSource
    labels: list[Annotated[Label, _without((*RESERVED_TOKENS, END_OF_UTTERANCE))]] = Field(
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

    @property
    def spoken_labels(self) -> list[str]:
        """The labels as the model reads them; the answer has them as they were sent."""
        return [label.strip() for label in self.labels]


class Write(Job):
    """Write a text that images guide: a story, an advert, a post."""

    task = "idefics.write"

    images: ImageSources = Field(min_length=1, max_length=MAX_ENTRIES)
    """One or more images."""
    instruction: Text = "Use the image to write a story."
    """What to write."""
    lead: Text = "Story:"
    """The line before the text."""


class ImagePart(_Frozen):
    image: ImageSource


class TextPart(_Frozen):
    text: RawText


def _kind_of_part(part: Any) -> str | None:
    if isinstance(part, dict):
        return f"{_IN_UNION}{'image' if 'image' in part else 'text'}"
    if isinstance(part, ImagePart | TextPart):
        return f"{_IN_UNION}{'image' if isinstance(part, ImagePart) else 'text'}"
    return None


if TYPE_CHECKING:
    # Strings and dictionaries, too: the guide's lists as they are.
    Parts: TypeAlias = list[Any]
else:
    Parts = list[
        Annotated[
            Annotated[ImagePart, Tag(f"{_IN_UNION}image")] | Annotated[TextPart, Tag(f"{_IN_UNION}text")],
            Discriminator(
                _kind_of_part,
                custom_error_type="part",
                custom_error_message='a part is a string, {"image": ...} or {"text": ...}',
            ),
        ]
    ]


def _strings_too(schema: dict[str, Any]) -> None:
    """Adds to a prompt's JSON Schema the plain strings that `_named_part` turns into parts."""
    schema["items"] = {"anyOf": [{"type": "string", "maxLength": MAX_TEXT_CHARS}, schema["items"]]}


class Complete(Job):
    """Continue a list of texts and images, exactly as the IDEFICS guide writes it.

    A string that is wholly an http(s) URL or a `data:image/` URI is an image; `{"image": ...}` and
    `{"text": ...}` say it outright.
    """

    task = "idefics.complete"

    prompt: Parts = Field(min_length=1, max_length=MAX_ENTRIES, json_schema_extra=_strings_too)
    """Texts and images in order: strings, `{"text": ...}` or `{"image": ...}`."""

    @field_validator("prompt", mode="before")
    @classmethod
    def _strings_say_what_they_are(cls, prompt: Any) -> Any:
        if not isinstance(prompt, list):
            return prompt
        return [_named_part(part) for part in prompt]

    @field_validator("prompt")
    @classmethod
    def _no_reserved_token_in_pieces(cls, prompt: list[ImagePart | TextPart]) -> list[ImagePart | TextPart]:
        _refuse_tokens_in_pieces(
            RESERVED_TOKENS, (part.text if isinstance(part, TextPart) else None for part in prompt)
        )
        return prompt


def _named_part(part: Any) -> Any:
    if isinstance(part, str):
        return {"image": part} if is_meant_as_image(part) else {"text": part}
    return {"image": part} if is_at_hand(part) else part


class ChatImageUrl(_Frozen):
    url: ImageUrl
    detail: Literal["auto", "low", "high", "original"] = "auto"
    """Accepted for OpenAI's clients and ignored: the model has one resolution."""


class ChatImagePart(_Frozen):
    type: Literal["image_url"]
    image_url: ChatImageUrl


class ChatTextPart(_Frozen):
    type: Literal["text"]
    text: Text


def _kind_of_chat_part(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return f"{_IN_UNION}{kind}" if kind in ("text", "image_url") else None


ChatPart = Annotated[
    Annotated[ChatTextPart, Tag(f"{_IN_UNION}text")] | Annotated[ChatImagePart, Tag(f"{_IN_UNION}image_url")],
    Discriminator(
        _kind_of_chat_part,
        custom_error_type="part",
        custom_error_message='type is one of "text" and "image_url": a part is {"type": "text", "text": ...} or '
        '{"type": "image_url", "image_url": {"url": ...}}',
    ),
]


class ChatMessage(_Frozen):
    role: Literal["system", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag(f"{_IN_UNION}text")] | Annotated[list[ChatPart], Tag(f"{_IN_UNION}parts")],
        Discriminator(lambda content: f"{_IN_UNION}{'parts' if isinstance(content, list) else 'text'}"),
    ]

    @model_validator(mode="before")
    @classmethod
    def _in_plain_form(cls, message: Any) -> Any:
        return plain_message(message)


if TYPE_CHECKING:
    ChatMessages: TypeAlias = Sequence[ChatMessage | Mapping[str, Any]]
else:
    ChatMessages = list[ChatMessage]


class Chat(Job):
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
            _refuse_tokens_in_pieces((*RESERVED_TOKENS, END_OF_UTTERANCE), texts)
        return messages


PAYLOADS: dict[str, type[Job]] = {
    payload.task: payload for payload in (Caption, Answer, Classify, Write, Complete, Chat)
}


def check_size(job: Job, most: int) -> None:
    """Raises InvalidRequest for a job with more bytes, before it is sent; ImageTooLarge where its pictures are why."""
    arguments = job.arguments()
    size = len(json.dumps(arguments))
    if size <= most:
        return
    pictures = [len(uri) for uri in _data_uris(arguments)]
    # Base64 makes four characters of three bytes.
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
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> JobError:
    faults = error.errors(include_url=False, include_input=False)
    for fault in faults:
        if kind := _PICTURE_ERRORS.get(fault["type"]):
            return kind(fault["msg"], detail=fault.get("ctx", {}).get("detail"))
    return InvalidRequest("; ".join(map(_told, faults[:10])))


def _named(place: int | str) -> str:
    """A field's name, as far as it is one: an unknown field's may be anything that a producer took for it."""
    return str(place) if isinstance(place, int) or _NAME.fullmatch(place) else "(a field)"


def _told(fault: ErrorDetails) -> str:
    places = (place for place in fault["loc"] if not str(place).startswith(_IN_UNION))
    where = ".".join(map(_named, places)) or "payload"
    return f"{where}: {fault['msg'].removeprefix('Value error, ')}"


class _Reply(BaseModel):
    # An older client ignores fields that a newer worker adds.
    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


class Usage(_Reply):
    """Tokens and images of a job."""

    prompt_tokens: int
    completion_tokens: int
    images: int
    cached_images: int = 0
    """Images whose features came from the cache."""


class ModelInfo(_Reply):
    """The model that answered."""

    id: str
    revision: str | None = None
    family: str
    dtype: str
    quantization: str | None = None


class Timing(_Reply):
    """Seconds of a job."""

    queued_s: float
    """From submission to its start in a worker."""
    fetch_s: float
    """Download and decoding of its images."""
    wait_s: float
    """In the engine, before its first step."""
    generate_s: float
    """From its first step to its last."""


class Result(_Reply):
    """A finished job's answer. `text` is the new text only; `label` and `scores` come from `classify`."""

    text: str
    """The new text, without the prompt."""
    finish_reason: Literal["stop", "length", "stop_sequence", "canceled", "deadline"]
    """Why the text ends."""
    label: str | None = None
    """The most likely label, for `classify`."""
    scores: dict[str, float] | None = None
    """Each label's probability, for `classify`."""
    usage: Usage
    """Counts of tokens and images."""
    model: ModelInfo
    """The model that answered: id, revision, family, dtype, quantization."""
    timing: Timing
    """Seconds that the job spent in each part of its way."""
    generation: dict[str, Any] = {}
    """transformers' generation parameters that applied, including the checkpoint's. Empty: plain greedy decoding."""
    metadata: dict[str, Any] = {}
    """The job's own metadata."""


#: What a job ended with.
Outcome = Result | JobError | JobCanceled
