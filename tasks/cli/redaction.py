"""Redacts a failed job for display: possible secrets and long texts are removed. Pure."""

from __future__ import annotations

import re
from typing import Any

#: Characters of a text that are shown.
SHOWN_CHARS = 200
_SECRET_NAME = re.compile(r"pass|secret|token|credential|authorization|signature|cookie|api.?key", re.IGNORECASE)
_DATA_URI = re.compile(r"(data:[\w.+/-]+(?:;[\w.+=-]+)*,)(\S*)", re.IGNORECASE)
#: Matches from the `://` on: a search for the scheme before it would take quadratic time in a text of words and dots.
_URL = re.compile(r"://([^\s/@]*@)?([^\s?#]*)([?#]\S*)?")


def redacted(value: Any) -> Any:
    """JSON without possible secrets: URLs' credentials and queries, pictures, long texts, fields with such names."""
    if isinstance(value, dict):
        return {name: _redacted_field(name, content) for name, content in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return _redacted_text(value) if isinstance(value, str) else value


def _redacted_field(name: str, value: Any) -> Any:
    return "****" if isinstance(value, str) and _SECRET_NAME.search(name) else redacted(value)


def _redacted_text(text: str) -> str:
    text = _DATA_URI.sub(lambda match: f"{match[1]}****", text)
    text = _URL.sub(_redacted_url, text)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}... ({len(text)} characters)"


def _redacted_url(match: re.Match[str]) -> str:
    credentials, place, query = match.groups()
    return f"://{'****@' if credentials else ''}{place}{query[0] + '****' if query else ''}"
