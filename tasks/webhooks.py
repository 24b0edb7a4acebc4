"""Callbacks' bodies, and `verify` for their receivers: Standard Webhooks, https://www.standardwebhooks.com.

    event = verify(secret, request.headers, request.body)
    for one in event.events:
        print(one.data.id, one.data.result or one.data.error)

Answer with 2xx once you have stored it. A delivery may arrive more than once, with the same `event.id`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, ValidationError
from standardwebhooks import Webhook, WebhookVerificationError

from .addresses import is_public, literal
from .described_model import DescribedModel
from .errors import ConfigurationError, ErrorBody, IdeficsError, InvalidRequest, from_exception
from .payloads import Callback
from .results import Result

JobEvent: TypeAlias = Literal["job.succeeded", "job.failed", "job.canceled", "job.reviewed"]

#: Bytes of a body.
MAX_BODY_BYTES = 20_000
#: Bytes, as JSON, to which a text is cut if the body would be too large.
CUT_TEXT_BYTES = 4_000
#: Signatures of one delivery that are checked: a valid delivery has one for each secret in rotation.
MAX_SIGNATURES = 8

_FORM_OF_SECRETS = "a secret is whsec_ and base64 of 24 to 64 bytes"

NOTE = "Cut to fit 20 kB: read the whole result by the job's id."


class InvalidWebhook(IdeficsError, ValueError):
    """None of your secrets has signed this just now: answer 401; check the secret, the clock, and the body's bytes."""

    code = "invalid_webhook"
    http_status = 401
    public = {"": "The signature is not valid."}


class _Received(DescribedModel):
    # An older receiver ignores fields that a newer worker adds.
    model_config = ConfigDict(extra="ignore", frozen=True)


class Failure(_Received):
    """A failed job's error: the code is stable, the message has the cure.

    The detail, if there is one, is the exact reason, such as `http_404`.
    """

    code: str
    message: str
    detail: str | None = None

    def response(self) -> tuple[int, ErrorBody]:
        """The answer for a web application's visitors: see `IdeficsError.response`. The message is for you."""
        return from_exception(Exception(self.code, self.message, self.detail)).response()


class Outcome(_Received):
    """How a job ended: `result` if it succeeded, or the result so far if it was canceled; else `error`."""

    id: str
    task: str
    result: Result | None = None
    error: Failure | None = None
    metadata: dict[str, Any] = {}
    truncated: list[str] = []
    """Fields that were cut to fit 20 kB: read the whole result by the job's id."""


class Review(Outcome):
    """What a person decided about a doubtful answer (`job.reviewed`). `result` and `error` are unset."""

    answer: str | None
    """The right answer; null if none of them is right, or if it cannot be told."""
    model_answer: str
    """The model's own answer: the result's `text`."""
    confidence: float
    """The result's confidence, which was below the job's `min_confidence`."""


class Batch(_Received):
    """Several jobs' events in one call, if the workers' operator has enabled batches."""

    events: list[Event] = Field(min_length=1)


class Event(_Received):
    """The content of a callback."""

    id: str
    """The same for every attempt at the same delivery."""
    type: JobEvent | Literal["job.batch"]
    timestamp: datetime
    data: Annotated[Review | Outcome | Batch, Field(union_mode="left_to_right")]

    @property
    def events(self) -> list[Event]:
        """The jobs' events: this one itself, or those of a batch."""
        return self.data.events if isinstance(self.data, Batch) else [self]


def verify(secrets: str | Iterable[str], headers: Mapping[str, str], body: bytes | str) -> Event:
    """The event in a request that one of your secrets signed within the last five minutes.

    `body` is the request's unchanged body. Raises InvalidWebhook, and ConfigurationError for a malformed secret.
    """
    webhooks = [Webhook(_checked_secret(secret)) for secret in ([secrets] if isinstance(secrets, str) else secrets)]
    if not webhooks:
        raise ConfigurationError(f"There is no secret to verify with: {_FORM_OF_SECRETS}.")
    lower = {str(name).lower(): str(value) for name, value in headers.items()}
    signatures = lower.get("webhook-signature", "").split()[:MAX_SIGNATURES]
    for webhook in webhooks:
        if any(_is_signed(webhook, {**lower, "webhook-signature": one}, body) for one in signatures):
            return _event(lower["webhook-id"], body)
    raise InvalidWebhook(InvalidWebhook.__doc__)


def _checked_secret(secret: str) -> str:
    # Some services show secrets without the prefix.
    text = secret.removeprefix("whsec_") if isinstance(secret, str) else ""
    try:
        length = len(base64.b64decode(text + "=" * (-len(text) % 4), validate=True))
    except ValueError:
        length = 0
    if not 24 <= length <= 64:
        # The secret is not shown: it may be nearly right.
        raise ConfigurationError(f"This is not a secret: {_FORM_OF_SECRETS}.")
    return secret


def _is_signed(webhook: Webhook, headers: dict[str, str], body: bytes | str) -> bool:
    try:
        webhook.verify(body, headers, json_parse=False)
    # The library's own error, or a plain ValueError for an unreadable signature or body.
    except (WebhookVerificationError, ValueError):
        return False
    return True


def _event(id: str, body: bytes | str) -> Event:
    try:
        return Event.model_validate({**json.loads(body), "id": id})
    except (ValidationError, ValueError, TypeError):
        raise InvalidWebhook("The signature is right, but the body is not an event of an IDEFICS job.") from None


def check_public(callback: Callback) -> None:
    """Refuse a callback that a worker with default settings refuses, as far as can be checked without the DNS.

    Raises InvalidRequest.
    """
    parts = urlsplit(callback.url)
    host = parts.hostname or ""
    address = literal(host)
    if parts.scheme != "https" or parts.port not in (None, 443):
        problem = "callbacks go by https and to its own port"
    elif host.rstrip(".").endswith("localhost") or (address is not None and not is_public(address)):
        problem = "its host is not public"
    else:
        return
    raise InvalidRequest(
        f"callback.url: {problem}. Use a public https:// URL, or, where your operator allows this one, "
        "Client(..., check_callbacks=False).",
        detail="callback",
    )


# --- The body: written by the workers -------------------------------------------------------------


def body(type: JobEvent, timestamp: str, data: dict[str, Any]) -> str:
    """An event as ASCII JSON of at most 20 kB. Fields that are too large are cut and listed in `truncated`."""
    text = _dumps(type, timestamp, data)
    for cut in (_cut_logprobs, _cut_choices, _cut_scores, _cut_text, _cut_message, _cut_metadata, _cut_result):
        if len(text) <= MAX_BODY_BYTES:
            break
        data = cut(data)
        text = _dumps(type, timestamp, data)
    return text


def batch_body(timestamp: str, events: Iterable[tuple[str, str]]) -> str:
    """The body of a batch, from the members' ids and bodies."""
    members = [{"id": id, **json.loads(text)} for id, text in events]
    return _dumps("job.batch", timestamp, {"events": members})


def _dumps(type: str, timestamp: str, data: dict[str, Any]) -> str:
    return json.dumps({"type": type, "timestamp": timestamp, "data": data}, separators=(",", ":"))


def _cut_logprobs(data: dict[str, Any]) -> dict[str, Any]:
    return _cut(data, "result", "logprobs", lambda logprobs: None)


def _cut_choices(data: dict[str, Any]) -> dict[str, Any]:
    return _cut(data, "result", "choices", lambda choices: None)


def _cut_scores(data: dict[str, Any]) -> dict[str, Any]:
    return _cut(data, "result", "scores", lambda scores: None)


def _cut_text(data: dict[str, Any]) -> dict[str, Any]:
    return _cut(data, "result", "text", shortened)


def _cut_message(data: dict[str, Any]) -> dict[str, Any]:
    return _cut(data, "error", "message", shortened)


def _cut_metadata(data: dict[str, Any]) -> dict[str, Any]:
    return _noted({**data, "metadata": {}}, "metadata") if data.get("metadata") else data


def _cut_result(data: dict[str, Any]) -> dict[str, Any]:
    return _noted({**data, "result": None}, "result") if data.get("result") else data


def _cut(data: dict[str, Any], part: str, name: str, shorten: Callable[[Any], Any]) -> dict[str, Any]:
    whole = data.get(part) or {}
    if not whole.get(name) or shorten(whole[name]) == whole[name]:
        return data
    return _noted({**data, part: {**whole, name: shorten(whole[name])}}, f"{part}.{name}")


def _noted(data: dict[str, Any], name: str) -> dict[str, Any]:
    return {**data, "truncated": [*data.get("truncated", []), name], "note": NOTE}


def shortened(text: str, most: int = CUT_TEXT_BYTES) -> str:
    """The beginning of a text that takes at most `most` bytes as JSON."""
    while len(json.dumps(text)) > most:
        text = text[: min(len(text) - 1, len(text) * most // len(json.dumps(text)))]
    return text
