"""Names that producers import, and the forms of messages they send, as version 0.1 has them: all go on working."""

from __future__ import annotations

import importlib
import json
from types import SimpleNamespace
from typing import Any

import pytest
from kombu.transport.virtual import Message

import tasks
from tasks.errors import PUBLIC_MODULE
from tasks.payloads import parse
from tests.support.messages import raw_message
from worker.queue.envelope import Envelope, checked, opened

#: Of each public module of `idefics_jobs`; "" is the package itself. Names are only ever added.
NAMES = {
    "": """
        Answer AnswerExample BrokerRefused BrokerUnavailable Callback Caption CaptionExample Chat ChatMessage Classify
        ClassifyExample Client Complete ConfigurationError DeadlineExceeded EndUpdate FailedJob IdeficsError
        Image ImageBlocked ImageInvalid ImagePath ImageTooLarge ImageUnreachable Internal InvalidRequest Job JobCanceled
        JobError JobTimeout ModelInfo ModelNotFound NotFound NotPermitted OutOfMemory PromptTooLong QueueFull
        RestartedUpdate Result ServedModel StageUpdate SubmittedJob TextUpdate Timing Update Usage WorkerLost Write
        server_sent_event
    """,
    ".payloads": """
        Answer AnswerExample CALLBACK_QUEUE CANCEL_TTL_S Callback Caption CaptionExample Chat ChatImagePart
        ChatImageUrl ChatMessage ChatMessages ChatPart ChatTextPart CheckedImage Classify ClassifyExample Complete
        DEFAULT_PRIORITY END_OF_UTTERANCE HIDDEN Image ImagePart ImagePath ImageSource ImageSources ImageUrl Job Label
        MAX_ENTRIES MAX_JOB_BYTES MAX_LABELS MAX_METADATA_BYTES MAX_METADATA_DEPTH MAX_TEXT_CHARS ModelInfo
        NEAR_GREEDY Outcome PAYLOADS Parts QUEUE RESERVED_TOKENS RawText Result SUBMITTED_AT StopString Text TextPart
        Timing Usage Write check_size checked_metadata parse
    """,
    ".errors": """
        BrokerRefused BrokerUnavailable ConfigurationError DeadlineExceeded ERRORS ErrorBody IdeficsError ImageBlocked
        ImageInvalid ImageTooLarge ImageUnreachable Internal InvalidRequest JobCanceled JobError JobTimeout
        ModelNotFound NotFound NotPermitted OutOfMemory PUBLIC_MODULE PromptTooLong PublicError QueueFull WorkerLost
        from_broker from_exception
    """,
    ".testing": "Answer FakeClient FakeJob canned",
    ".webhooks": """
        Batch CUT_TEXT_BYTES Event Failure InvalidWebhook JobEvent MAX_BODY_BYTES MAX_SIGNATURES NOTE Outcome batch_body
        body check_public shortened verify
    """,
    ".batch": "Batch JobsLost PRIORITY WINDOW run",
    ".campaign": "CampaignError Limits Options Plan PlanError Progress Summary TableError Watch run",
    ".client": "Client Status SubmitOptions SubmittedJob",
}

URL = "https://example.com/a.jpg"
PATH = {"path": "a/b.jpg"}
COMMON: dict[str, Any] = {
    "max_new_tokens": 5,
    "num_beams": 1,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "logit_bias": {"7": -100.0},
    "n": 1,
    "logprobs": None,
    "seed": 3,
    "stop": ["\n"],
    "deadline_s": 30.0,
    "min_confidence": 0.7,
    "stream": True,
    "callback": {"url": "https://example.com/hook", "key_id": "k", "events": ["job.failed"]},
    "metadata": {"row": 7, "tags": ["a", None]},
    "idempotency_key": "row-7",
}
FORM = {"type": "choice", "choice": ["yes", "no"]}
#: Each task's own fields, all set.
OWN: dict[str, dict[str, Any]] = {
    "idefics.caption": {
        "image": URL,
        "prompt": "A photo of",
        "examples": [{"image": PATH, "text": "A dog"}],
        "instruction": "Say what it is.",
    },
    "idefics.answer": {
        "image": PATH,
        "question": "What is this?",
        "examples": [{"image": URL, "question": "Who?", "answer": "Me"}],
        "response_format": FORM,
    },
    "idefics.classify": {
        "image": URL,
        "labels": ["food", "animal"],
        "examples": [{"image": URL, "label": "food"}],
    },
    "idefics.write": {
        "images": [URL, PATH],
        "instruction": "Write an advert.",
        "lead": "Advert:",
        "response_format": FORM,
    },
    "idefics.complete": {"prompt": [{"text": "User:"}, {"image": URL}, {"image": PATH}], "response_format": FORM},
    "idefics.chat": {
        "response_format": FORM,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "assistant", "content": "Yes."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Who?"},
                    {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
                ],
            },
        ],
    },
}
OPTIONS = {"retries": 0, "timelimit": [None, None]}
MOST_BYTES = 1_000_000


@pytest.mark.parametrize("module", NAMES)
def test_every_public_name_can_be_imported(module: str) -> None:
    found = vars(importlib.import_module(f"{tasks.__name__}{module}"))
    assert set(NAMES[module].split()) <= set(found)


def test_every_name_of_the_package_is_listed_here() -> None:
    assert set(tasks.__all__) == set(NAMES[""].split())


def test_stored_errors_have_the_module_that_producers_import() -> None:
    assert PUBLIC_MODULE == "idefics_jobs.errors"


def envelope(task: str, arguments: dict[str, Any], protocol: int) -> Envelope:
    """A message as Celery's producers write it in this protocol, as the worker reads it."""
    job = {"task": task, "id": "job", **OPTIONS}
    if protocol == 1:
        raw = raw_message([], json.dumps({**job, "args": [], "kwargs": arguments}).encode())
    else:
        raw = raw_message(job, body=[[], arguments, {}])
    channel = SimpleNamespace(decode_body=lambda body, encoding: body)
    return checked(Message(opened(raw, "idefics", MOST_BYTES), channel=channel), MOST_BYTES)


@pytest.mark.parametrize("protocol", [1, 2])
@pytest.mark.parametrize("task", OWN)
def test_every_field_of_a_task_is_read_from_a_message_of_either_protocol(task: str, protocol: int) -> None:
    sent = {**COMMON, **OWN[task]}
    read = envelope(task, sent, protocol)
    assert (read.headers["task"], read.headers["id"]) == (task, "job")
    job = parse(read.headers["task"], read.payload[1])
    assert job.model_dump(mode="json", include=set(sent)) == sent
    # `exclude_defaults`: one beam is the default.
    defaults = ("num_beams", "n", "logprobs")
    assert job.arguments() == {name: value for name, value in sent.items() if name not in defaults}


@pytest.mark.parametrize("task", OWN)
def test_all_fields_of_a_task_are_among_these(task: str) -> None:
    job = parse(task, OWN[task])
    # Chat takes one of two names for its length. A `response_model` is sent as its schema.
    further = ["max_completion_tokens"] if task == "idefics.chat" else []
    sent = {name for name, field in type(job).model_fields.items() if not field.exclude}
    assert sent == {*COMMON, *OWN[task], *further}


def test_either_name_of_a_conversations_length_is_read() -> None:
    read = envelope("idefics.chat", {**OWN["idefics.chat"], "max_completion_tokens": 7}, 2)
    assert parse("idefics.chat", read.payload[1]).arguments()["max_completion_tokens"] == 7


def test_beams_are_read() -> None:
    # A form needs one beam.
    read = envelope("idefics.write", {**OWN["idefics.write"], "num_beams": 4, "response_format": None}, 1)
    assert parse("idefics.write", read.payload[1]).num_beams == 4
