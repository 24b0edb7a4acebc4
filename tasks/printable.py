"""Strangers' text as a terminal or a log may show it: pure.

A job's id, a host's name or an error's message can hold characters that move the cursor, begin a new line, or reorder
what stands beside them. They are shown as escapes, as in Python's and JSON's strings.
"""

from __future__ import annotations

import json
import re

# Line and paragraph separators, marks that reorder text (bidi), invisible ones (BOM, soft hyphen, zero width space,
# tags), and halves of surrogate pairs, which no output can encode. Joiners stay: scripts and emoji need them.
_HIDDEN = (
    "\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f"
)
_UNPRINTABLE = re.compile(f"[\x00-\x1f{_HIDDEN}]")
_UNPRINTABLE_IN_JSON = re.compile(f"[{_HIDDEN}]")


def escaped(text: str) -> str:
    """The text on one line: control characters, newlines among them, as `\\n`, `\\x1b` or `\\u202e`."""
    # Text that Python calls printable has none of them, and that check is faster than a search.
    return text if text.isprintable() else _UNPRINTABLE.sub(_python_escape, text)


def escaped_json(text: str) -> str:
    """JSON, as `json.dumps(..., ensure_ascii=False)` writes it, that means the same and is safe to show."""
    return _UNPRINTABLE_IN_JSON.sub(_json_escape, text)


def _python_escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def _json_escape(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1]
