"""Converts OpenAI's chat requests to our form. Pure.

OpenAI's fields that change nothing here are left out. Fields that request an unsupported feature stay, so that they are
refused by name.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

ENDPOINT = "/v1/chat/completions"

#: Fields that never change the job. A batch's line goes by its model (`batch_models.py`).
_IGNORED = {
    "metadata",
    "model",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
#: Unsupported fields, with the values that have no effect. Null has no effect in any field.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "ignore_eos": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "reasoning_effort": ("none", "minimal", "low", "medium"),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "stop": ("", []),
    "stream": (False,),
    "stream_options": ({}, {"include_usage": False}, {"include_usage": True}),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (-1,),
    "top_logprobs": (0,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}
_LENGTHS = ("max_completion_tokens", "max_tokens")

#: Fields of a message that have no counterpart in a prompt here.
_MESSAGE_IGNORED = {"annotations", "name"}
_ROLES = {"developer": "system"}
#: Fields of a message and of its parts that stay even if they are null or empty.
_MESSAGE_FIELDS = {"role", "content"}
_PART_FIELDS = {"type", "text", "image_url", "url"}
_EMPTY: tuple[Any, ...] = (None, "", [], {})


def is_endpoint(url: Any) -> bool:
    """Whether a batch line's URL is OpenAI's for chat completions, or Azure's with a deployment and a version."""
    if not isinstance(url, str):
        return False
    try:
        path = urlsplit(url).path
    except ValueError:
        return False
    return f"/{path.strip('/')}".endswith("/chat/completions")


def chat_arguments(body: dict[str, Any]) -> dict[str, Any]:
    """A request's body as the arguments of `idefics.chat`."""
    arguments = {name: value for name, value in body.items() if name not in _IGNORED and value is not None}
    for name, values in _NEUTRAL.items():
        if arguments.get(name) in values:
            del arguments[name]
    lengths = [arguments.pop(name) for name in _LENGTHS if name in arguments]
    if lengths:
        arguments["max_completion_tokens"] = lengths[0]
    if arguments.get("logprobs") is True:
        arguments["logprobs"] = arguments.pop("top_logprobs", 0)
    if isinstance(arguments.get("stop"), str):
        arguments["stop"] = [arguments["stop"]]
    if arguments.get("top_p") == 0:
        # With a top_p of 0 only the likeliest token is left: greedy.
        del arguments["top_p"]
        arguments.pop("temperature", None)
    elif _are_several(arguments):
        # OpenAI's default. Greedy answers would be equal.
        arguments.setdefault("temperature", 1)
    return arguments


def _are_several(arguments: dict[str, Any]) -> bool:
    """Whether more than one answer is asked for, and not the best beams."""
    count = arguments.get("n")
    return isinstance(count, int) and count > 1 and "num_beams" not in arguments


def plain_message(message: Any) -> Any:
    """A message reduced to its role, text and images. Messages of OpenAI's answers are accepted, too.

    Anything else is returned unchanged, to be refused.
    """
    if not isinstance(message, dict):
        return message
    plain = {
        name: value
        for name, value in message.items()
        if name in _MESSAGE_FIELDS or not (name in _MESSAGE_IGNORED or value in _EMPTY)
    }
    role = plain.get("role")
    if isinstance(role, str):
        plain["role"] = _ROLES.get(role, role)
    if role == "assistant" and plain.get("content") is None:
        # A refusal is the assistant's text.
        refusal = plain.pop("refusal", "")
        plain["content"] = refusal
    if isinstance(plain.get("content"), list):
        plain["content"] = [_plain_part(part) for part in plain["content"]]
    return plain


def _plain_part(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    plain = {name: value for name, value in part.items() if name in _PART_FIELDS or value not in _EMPTY}
    image = plain.get("image_url")
    if isinstance(image, str):
        plain["image_url"] = {"url": image}
    elif isinstance(image, dict):
        plain["image_url"] = {
            name: value for name, value in image.items() if name in _PART_FIELDS or value not in _EMPTY
        }
    if plain.keys() == {"type", "refusal"} and plain["type"] == "refusal":
        return {"type": "text", "text": plain["refusal"]}
    return plain


def _without_empty(part: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if name in _PART_FIELDS or value not in _EMPTY}
