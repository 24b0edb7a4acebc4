"""What a job asks, as one text for a person. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from functools import singledispatch
from typing import cast

from tasks.chat_messages import ChatMessage, ChatTextPart
from tasks.payloads import Answer, Caption, Chat, Classify, Complete, Job, Write
from tasks.prompt_parts import TextPart

#: Characters of the text. Of a longer one the middle is left out.
MAX_CHARS = 4_000
PICTURE = "[picture]"
_LEFT_OUT = " [...] "


def asked(job: Job) -> str:
    """A job's question, instruction, prompt or conversation."""
    text = _asked(job).strip()
    if len(text) <= MAX_CHARS:
        return text
    half = (MAX_CHARS - len(_LEFT_OUT)) // 2
    return text[:half] + _LEFT_OUT + text[-half:]


@singledispatch
def _asked(job: Job) -> str:
    raise TypeError(f"{type(job).__name__} has no text for a person")


@_asked.register
def _caption(job: Caption) -> str:
    return _lines([job.instruction, job.prompt or ""])


@_asked.register
def _answer(job: Answer) -> str:
    return job.question


@_asked.register
def _classify(job: Classify) -> str:
    return f"Which of these is it? {', '.join(job.labels)}"


@_asked.register
def _write(job: Write) -> str:
    return _lines([job.instruction, job.lead])


@_asked.register
def _complete(job: Complete) -> str:
    return _lines(part.text if isinstance(part, TextPart) else PICTURE for part in job.prompt)


@_asked.register
def _chat(job: Chat) -> str:
    messages = cast(list[ChatMessage], job.messages)
    return _lines(f"{message.role.capitalize()}: {_content(message)}" for message in messages)


def _content(message: ChatMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    return " ".join(part.text if isinstance(part, ChatTextPart) else PICTURE for part in message.content)


def _lines(texts: Iterable[str]) -> str:
    return "\n".join(filter(None, map(str.strip, texts)))
