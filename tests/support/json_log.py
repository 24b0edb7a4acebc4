"""The log of a worker with IDEFICS_LOG_FORMAT=json."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

#: The fields that a record may have, in their order.
ALWAYS = ["time", "level", "logger", "message", "process", "pid"]
SOMETIMES = ["job_id", "task", "code", "trace_id", "traceback", "stack"]


def records(log: Path) -> list[dict[str, Any]]:
    """All of a log's records; each line must be one."""
    found = [json.loads(line) for line in log.read_text().splitlines()]
    for record in found:
        names = list(record)
        assert names[:6] == ALWAYS, record
        assert names[6:] == [name for name in SOMETIMES if name in record], record
        assert datetime.fromisoformat(record["time"]).utcoffset() is not None
    return found


def about(log: Path, id: str) -> list[dict[str, Any]]:
    """A log's records about a job."""
    return [record for record in records(log) if record.get("job_id") == id]
