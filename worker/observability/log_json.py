"""The log as JSON: one object a line, with a fixed set of fields.

Only the fields below are written. python-json-logger would also write whatever a library attaches to its records, and
the keys of a dictionary that is logged as a message: either could hold a prompt or imitate a field.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from worker.observability import tracing
from worker.observability.job_fields import job_fields
from worker.observability.log_lines import shown_message


class JsonLineFormatter(JsonFormatter):
    """Formats records for programs: Loki, Elasticsearch, `jq`."""

    def __init__(self, process: str) -> None:
        """`process`: which of the worker's processes this is, such as `model`."""
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            # Escaped as in the text format, so that a line of it printed by another program is one line.
            "message": shown_message(record),
            "process": self._process,
            "pid": record.process,
            **job_fields(record),
        }
        if trace := tracing.trace_id():
            fields["trace_id"] = trace
        if record.exc_info or record.exc_text:
            fields["traceback"] = self.formatException(record.exc_info) if record.exc_info else record.exc_text
        if record.stack_info:
            fields["stack"] = self.formatStack(record.stack_info)
        return self.serialize_log_record(fields)
