"""Payloads, whole and least, and what their refusals say."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.errors import InvalidRequest
from tasks.payloads import parse

URL = "https://example.com/a.jpg"
#: The least that each task takes.
LEAST: dict[str, dict[str, Any]] = {
    "idefics.caption": {"image": URL},
    "idefics.answer": {"image": URL, "question": "What is this?"},
    "idefics.classify": {"image": URL, "labels": ["food", "animal"]},
    "idefics.write": {"images": [URL]},
    "idefics.complete": {"prompt": [URL, "A"]},
    "idefics.chat": {"messages": [{"role": "user", "content": "Hello"}]},
}


def refusal(task: str, **arguments: Any) -> str:
    with pytest.raises(InvalidRequest) as refused:
        parse(task, {**LEAST[task], **arguments})
    return str(refused.value)
