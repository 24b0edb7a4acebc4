"""What a job asks, for people: its pictures and its prompt. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

#: The fields whose texts are the prompt, in order.
_PROMPTS = ("instruction", "prompt", "question", "lead")


def pictures(arguments: Mapping[str, Any]) -> list[Any]:
    """The pictures of a job's arguments, without those of its examples: addresses, data: URIs, `{"path": ...}`."""
    found = [arguments["image"]] if "image" in arguments else list(arguments.get("images", ()))
    parts = arguments.get("prompt", ())
    found += [part["image"] for part in parts if isinstance(part, Mapping) and "image" in part]
    found += [part["image_url"]["url"] for part in _chat_parts(arguments) if "image_url" in part]
    return found


def prompt(arguments: Mapping[str, Any]) -> str:
    """The texts that a job's arguments hold beside its pictures, examples and labels; often one question."""
    texts = [str(arguments[name]) for name in _PROMPTS if isinstance(arguments.get(name), str)]
    parts = arguments.get("prompt", ())
    texts += [part["text"] for part in parts if isinstance(part, Mapping) and "text" in part]
    texts += [part["text"] for part in _chat_parts(arguments) if "text" in part]
    return "\n".join(filter(None, map(str.strip, texts)))


def _chat_parts(arguments: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for message in arguments.get("messages", ()):
        content = message.get("content")
        yield from [{"text": content}] if isinstance(content, str) else content or ()
