"""A batch file's lines: the job of each, and the line that answers it.

Ours: `{"custom_id": "r1", "task": "caption", "arguments": {"image": "https://..."}}`, answered with
`{"custom_id": "r1", "result": {...}}` or `{"custom_id": "r1", "error": {"code": "...", "message": "..."}}`. It may have
a `"model"` beside its task. OpenAI's batch lines for /v1/chat/completions become `Chat` jobs and are answered in
OpenAI's form; their `model` is in the body. `tasks/batch_models.py` says what it does.
"""

from __future__ import annotations

import hashlib
import json
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .errors import DeadlineExceeded, InvalidRequest, JobCanceled, JobError, ModelNotFound
from .openai_form import ENDPOINT, chat_arguments, is_endpoint
from .outcomes import Outcome
from .payloads import Job, parse
from .results import Choice, Result, TokenLogprob, TopLogprob

MAX_CUSTOM_ID_CHARS = 512

#: What a tokenizer writes for a part of a character.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
#: Finish reasons other than OpenAI's `stop`.
_FINISH_REASONS = {"length": "length", "deadline": "length"}
#: Error codes of refused requests; other failed jobs have no answer.
_REFUSALS = {
    "invalid_request",
    "prompt_too_long",
    "image_blocked",
    "image_unreachable",
    "image_too_large",
    "image_invalid",
    ModelNotFound.code,
}
_REQUEST_ID = "batch_req_"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the input."""

    #: From 1.
    number: int
    #: None if the line has no valid one.
    custom_id: str | None = None
    is_openai: bool = False
    #: The line's object.
    asked: dict[str, Any] | None = None
    #: The model that it names.
    model: str | None = None
    #: Why it is refused without a look at its payload.
    fault: InvalidRequest | None = None
    #: Its custom_id is another line's.
    is_duplicate: bool = False
    #: Digest of the whole line: a corrected line is another job.
    digest: bytes = b""

    @property
    def is_numbered(self) -> bool:
        """Whether its answer is identified by the line's number, since it has no usable custom_id."""
        return self.custom_id is None or self.is_duplicate

    @property
    def fingerprint(self) -> int:
        """64-bit hash of custom_id or line number; matches output to input on resume."""
        return fingerprint(_key(None if self.is_numbered else self.custom_id, self.number))

    def as_duplicate(self) -> Line:
        message = f"Line {self.number}: custom_id {self.custom_id!r} is an earlier line's: give each line its own."
        return replace(self, fault=InvalidRequest(message), is_duplicate=True)

    def without_payload(self) -> Line:
        return replace(self, asked=None)

    def job(self) -> Job:
        """The line's job. Raises a JobError if the line is refused."""
        if self.fault:
            raise self.fault
        asked = self.asked or {}
        job = _chat(asked) if self.is_openai else _ours(asked)
        if job.idempotency_key:
            raise InvalidRequest("idempotency_key: a batch's line has its custom_id for that. Leave the key out.")
        return job


def read_line(number: int, text: str | bytes) -> Line:
    """A line of the input; its payload is not checked yet."""
    content = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    return replace(_line(number, text), digest=hashlib.blake2b(content.strip(), digest_size=8).digest())


def _line(number: int, text: str | bytes) -> Line:
    try:
        asked = json.loads(text)
    except UnicodeDecodeError:
        return Line(number, fault=InvalidRequest(f"Line {number} is not JSON in UTF-8: save the file as UTF-8."))
    except (ValueError, RecursionError) as error:
        return Line(number, fault=InvalidRequest(f"Line {number} is not JSON: {error}"))
    if isinstance(asked, list):
        message = f"Line {number} is not a JSON object but an array: write each of its objects as its own line."
        return Line(number, fault=InvalidRequest(message))
    if not isinstance(asked, dict):
        return Line(number, fault=InvalidRequest(f"Line {number} is not a JSON object."))
    is_openai = "body" in asked or "url" in asked
    custom_id = asked.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARS or not _is_utf8(custom_id):
        message = f"Line {number}: custom_id must be a text of 1 to {MAX_CUSTOM_ID_CHARS} characters."
        return Line(number, is_openai=is_openai, fault=InvalidRequest(message))
    return Line(number, custom_id, is_openai, asked, _model(asked, is_openai))


def _model(asked: dict[str, Any], is_openai: bool) -> str | None:
    """What a line says of its model; None where that is nothing, or no text: OpenAI's is then ignored."""
    body = asked.get("body") if is_openai else asked
    model = body.get("model") if isinstance(body, dict) else None
    return model if isinstance(model, str) else None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _ours(asked: dict[str, Any]) -> Job:
    unknown = asked.keys() - {"custom_id", "task", "arguments", "model"}
    if unknown or not isinstance(asked.get("task"), str) or not isinstance(asked.get("arguments"), dict):
        raise InvalidRequest(
            'A line is {"custom_id": "...", "task": "caption", "arguments": {...}}, or one of OpenAI\'s batch files'
            + (f"; unknown: {', '.join(sorted(unknown))}." if unknown else ".")
        )
    if not isinstance(asked.get("model"), str | None):
        raise InvalidRequest("model: a text is expected, the name or the id of a model that workers serve.")
    task: str = asked["task"]
    return parse(task if task.startswith("idefics.") else f"idefics.{task}", asked["arguments"])


def _chat(asked: dict[str, Any]) -> Job:
    body = asked.get("body")
    is_post = str(asked.get("method", "POST")).upper() == "POST"
    if not is_post or not is_endpoint(asked.get("url")) or not isinstance(body, dict):
        raise InvalidRequest(f"An OpenAI batch line has method POST, url {ENDPOINT} and an object as its body.")
    # Remaining fields that are not ours are refused by name.
    return parse("idefics.chat", chat_arguments(body))


# Answers


def answer(line: Line, outcome: Outcome | ModelNotFound, job_id: str) -> dict[str, Any]:
    """The output's object for a line."""
    return _openai_answer(line, outcome, job_id) if line.is_openai else _our_answer(line, outcome)


def is_failed(answer: dict[str, Any]) -> bool:
    if "response" in answer:
        return answer["response"] is None or answer["response"]["status_code"] != 200
    return "error" in answer


def answered(answer: dict[str, Any]) -> int:
    """The fingerprint of an answer's line. Raises ValueError for anything but an answer of a batch."""
    if not isinstance(answer, dict) or "custom_id" not in answer or not answer.keys() & {"result", "error"}:
        raise ValueError("no answer of a batch")
    if "response" in answer:
        return int(str(answer["id"]).removeprefix(_REQUEST_ID), 16)
    return fingerprint(_key(None if "line" in answer else answer["custom_id"], answer.get("line", 0)))


def _our_answer(line: Line, outcome: Outcome | ModelNotFound) -> dict[str, Any]:
    told: dict[str, Any] = {"custom_id": line.custom_id}
    if line.is_numbered:
        told["line"] = line.number
    if isinstance(outcome, Result):
        return {**told, "result": outcome.model_dump(mode="json")}
    return {**told, "error": outcome.as_dict()}


def _openai_answer(line: Line, outcome: Outcome | ModelNotFound, job_id: str) -> dict[str, Any]:
    told = {"id": f"{_REQUEST_ID}{line.fingerprint:016x}", "custom_id": line.custom_id}
    if isinstance(outcome, Result):
        return {**told, "response": _response(200, job_id, _completion(outcome, job_id)), "error": None}
    if outcome.code in _REFUSALS:
        error = {**outcome.as_dict(), "type": "invalid_request_error", "param": None}
        status = ModelNotFound.http_status if isinstance(outcome, ModelNotFound) else 400
        return {**told, "response": _response(status, job_id, {"error": error}), "error": None}
    return {**told, "response": None, "error": {**outcome.as_dict(), "code": _batch_code(outcome)}}


def _batch_code(outcome: JobError | JobCanceled | ModelNotFound) -> str:
    if isinstance(outcome, JobCanceled):
        return "batch_cancelled"
    return "batch_expired" if isinstance(outcome, DeadlineExceeded) else outcome.code


def _response(status: int, job_id: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"status_code": status, "request_id": job_id, "body": body}


def _completion(result: Result, job_id: str) -> dict[str, Any]:
    usage = result.usage
    answers: Sequence[Choice | Result] = result.choices or [result]
    return {
        "id": f"chatcmpl-{job_id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": result.model.id,
        "choices": [_choice(index, choice) for index, choice in enumerate(answers)],
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        },
        "system_fingerprint": None,
        # Not OpenAI's, as the `min_confidence` that was asked for.
        **({"abstained": True} if result.abstained else {}),
    }


def _choice(index: int, choice: Choice | Result) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": None if choice.logprobs is None else _logprobs(choice.logprobs),
        "finish_reason": _FINISH_REASONS.get(choice.finish_reason, "stop"),
    }


def _logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    content = [
        {**_logprob(token), "top_logprobs": [_logprob(likely) for likely in token.top_logprobs]} for token in tokens
    ]
    return {"content": content, "refusal": None}


def _logprob(token: TopLogprob) -> dict[str, Any]:
    # The bytes of a token that is a part of a character are not known.
    known = REPLACEMENT not in token.token
    return {"token": token.token, "logprob": token.logprob, "bytes": list(token.token.encode()) if known else None}


# Fingerprints


def _key(custom_id: Any, number: int) -> str:
    return f"line {number}" if custom_id is None else f"id {custom_id}"


def fingerprint(text: str) -> int:
    """64 bits, never 0. Among a million texts, two collide with a probability of one in forty million."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) or 1


class Fingerprints:
    """A set of fingerprints in 12 to 32 bytes each; Python's own takes 100."""

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * 1024))
        self._used = 0

    def __len__(self) -> int:
        return self._used

    def __contains__(self, number: int) -> bool:
        return self._slots[self._place(number)] == number

    def add(self, number: int) -> bool:
        """Add a fingerprint. False if it was in the set already."""
        place = self._place(number)
        if self._slots[place] == number:
            return False
        self._slots[place] = number
        self._used += 1
        if self._used * 3 > len(self._slots) * 2:
            self._grow()
        return True

    def _place(self, number: int) -> int:
        slots, mask = self._slots, len(self._slots) - 1
        place = number & mask
        while slots[place] not in (0, number):
            place = (place + 1) & mask
        return place

    def _grow(self) -> None:
        old, self._slots = self._slots, array("Q", bytes(8 * 2 * len(self._slots)))
        for number in old:
            if number:
                self._slots[self._place(number)] = number
