"""The log's format: each record is one line, and no message can imitate another record.

Messages contain text from producers and hosts: ids, names of tasks, hosts, texts of errors. Control characters in it
are escaped. The lines of a traceback are indented, so that each line that begins with a time is a record.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from numbers import Number
from types import TracebackType
from typing import Any, TypeAlias

from tasks.printable import escaped

FORMAT = "%(asctime)s %(levelname)s [%(process)d] %(name)s: %(message)s"
INDENT = "    "

_ExceptionInfo: TypeAlias = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class Lines(str):
    """A trusted text, such as a traceback, that keeps its lines in the log."""

    __slots__ = ()


class LineFormatter(logging.Formatter):
    """Formats records for a handler that writes to a terminal or a file."""

    def __init__(self) -> None:
        super().__init__(FORMAT)

    def format(self, record: logging.LogRecord) -> str:
        if _is_plain(record):
            return super().format(record)
        shown = logging.makeLogRecord(record.__dict__)
        shown.msg, shown.args = shown_message(record), None
        return super().format(shown)

    def formatException(self, ei: _ExceptionInfo) -> str:  # noqa: N802 - logging's name
        return _indented(super().formatException(ei), INDENT)

    def formatStack(self, stack_info: str) -> str:  # noqa: N802 - logging's name
        return _indented(super().formatStack(stack_info), INDENT)


def _is_plain(record: logging.LogRecord) -> bool:
    """Whether a message needs no escapes. A fast path for most records, since each job logs two."""
    try:
        return record.getMessage().isprintable()
    except Exception:
        return False


def shown_message(record: logging.LogRecord) -> str:
    """A record's message with escapes for the control characters of its arguments."""
    if not record.args:
        return escaped(record.getMessage().strip("\n"))
    try:
        # The format string itself is trusted. Some of Celery's have several lines.
        text = str(record.msg) % _shown_arguments(record.args)
    except Exception:
        # The arguments do not fit the format.
        return escaped(f"{record.msg} {record.args!r}")
    first, *rest = text.strip("\n").split("\n")
    return "\n".join([escaped(first), *(INDENT + escaped(line) for line in rest)])


def _shown_arguments(arguments: Any) -> Any:
    if isinstance(arguments, Mapping):
        return {name: _shown(value) for name, value in arguments.items()}
    return tuple(_shown(value) for value in arguments)


def _shown(value: Any) -> Any:
    """An argument that `%s` and `%r` format as one line, and `%d` and `%f` as a number."""
    if isinstance(value, Lines | Number):
        return value
    return escaped(value) if isinstance(value, str) else _Escaped(value)


class _Escaped:
    def __init__(self, value: Any) -> None:
        self._value = value

    def __str__(self) -> str:
        return escaped(str(self._value))

    def __repr__(self) -> str:
        return escaped(repr(self._value))


def _indented(text: str, indent: str) -> str:
    return "\n".join(indent + escaped(line) for line in text.split("\n"))
