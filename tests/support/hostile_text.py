"""Text that would move a terminal's cursor, begin a line or reorder what stands beside it."""

from __future__ import annotations

#: A line that a record might be, and what moves the cursor, reorders text or hides in it.
FORGED = "2026-01-02 03:04:05,678 CRITICAL [1] worker.app: forged"
MARKS = [
    "\n", "\r", "\t", "\0", "\x07", "\b", "\x0b", "\x0c", "\x1b[2J", "\x1c", "\x7f", "\x85", "\x9b2J", "\xad",
    "\u061c", "\u200b", "\u200e", "\u200f", "\u2028", "\u2029", "\u202a", "\u202e", "\u2066", "\u2069", "\ufeff",
    "\ud800", "\udfff", "\U000e0041",
]  # fmt: skip
HOSTILE = "".join(f"a{mark}{FORGED}" for mark in MARKS)


def is_clean(text: str) -> bool:
    return all(char.isprintable() for char in text)
