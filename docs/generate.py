"""MkDocs hook: puts what the code knows into the pages, so that it is written once and committed nowhere else.

A line `<!-- generated: NAME -->` in a page is replaced by what the function of that name below returns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from config.__main__ import shown
from config.settings import PREFIX, RENAMED, Settings
from tasks import errors as tasks_errors
from tasks.errors import ERRORS, IdeficsError, JobError
from tasks.payloads import PAYLOADS, Job
from tasks.redis_keys import REDIS_KEYS
from tasks.results import Result
from worker.observability.metrics import CALLBACKS, DEFINITIONS, WORKER, Definition
from worker.observability.queue import GAUGES as QUEUE_METRICS

CHECKOUT = Path(__file__).parents[1]
MARK = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
#: A code block that says what its test needs (a GPU, Docker), which MkDocs takes for no code block.
_NEEDS = re.compile(r"^```(\w+) \w+$", re.MULTILINE)

#: Headings of the settings' page, each above the setting that it names.
GROUPS = {
    "broker_url": "Redis",
    "model": "Model",
    "max_batch_size": "Batch and limits",
    "image_allow_networks": "Images",
    "image_cache_bytes": "Caches",
    "callback_keys": "Callbacks",
    "result_ttl_s": "Results, time and retries",
    "failed_max": "Failed jobs",
    "review_max": "Review of doubtful answers",
    "state_file": "Health, metrics and logs",
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page with its generated parts. Called by MkDocs."""
    return _NEEDS.sub(r"```\1", MARK.sub(lambda mark: PARTS[mark[1]](), markdown))


def settings() -> str:
    """A table for each group of settings: name, default, what it is for."""
    old_names = {field: PREFIX + old for old, field in RENAMED.items()}
    schema, defaults = Settings.model_json_schema()["properties"], Settings.model_construct()
    parts = []
    for name, field in Settings.model_fields.items():
        if name in GROUPS:
            parts.append(f"\n## {GROUPS[name]}\n\n| Setting | Default | |\n| --- | --- | --- |")
        default = shown(getattr(defaults, name))
        parts.append(
            _row(
                f"`{PREFIX}{name.upper()}`",
                default and f"`{default}`",
                _described(field, schema[name], old_names.get(name)),
            )
        )
    return "\n".join(parts)


def errors() -> str:
    """A table of the errors that a job can fail with."""
    return _errors(ERRORS.values())


def client_errors() -> str:
    """A table of the errors that the client alone raises."""
    found = vars(tasks_errors).values()
    kinds = [kind for kind in found if isinstance(kind, type) and issubclass(kind, IdeficsError)]
    return _errors(kind for kind in kinds if not issubclass(kind, JobError) and kind is not IdeficsError)


def fields() -> str:
    """A table of the fields that every task takes, then one for each task's own."""
    parts = ["## Fields of every task\n", _fields(Job.model_json_schema(), set())]
    for name, payload in PAYLOADS.items():
        schema = payload.model_json_schema()
        parts += [f"\n## `{name}`\n", f"{schema['description']}\n", _fields(schema, set(Job.model_fields))]
    return "\n".join(parts)


def result() -> str:
    """A table of a result's fields."""
    return _fields(Result.model_json_schema(), set())


def redis_keys() -> str:
    """A table of the keys in Redis."""
    rows = ["| Key | Database | Type | Seconds to live | Written by | |", "| --- | --- | --- | --- | --- | --- |"]
    for key in REDIS_KEYS:
        writers = ", ".join(key.writers)
        rows.append(_row(f"`{key.pattern}`", key.database, key.type, key.ttl or "no limit", writers, key.meaning))
    return "\n".join(rows)


def worker_metrics() -> str:
    """A table of a GPU worker's metrics."""
    return _metrics(DEFINITIONS[WORKER])


def callbacks_metrics() -> str:
    """A table of a callbacks worker's metrics."""
    return _metrics(DEFINITIONS[CALLBACKS])


def queue_metrics() -> str:
    """A table of the queue exporter's metrics."""
    return _metrics(QUEUE_METRICS.values())


def wire() -> str:
    """The protocol's description, which stands beside its example: without its heading and its links to files there."""
    text = (CHECKOUT / "examples" / "wire" / "README.md").read_text()
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)[^)]+\)", r"\1", text.partition("\n")[2])


#: By the name in a page's mark.
PARTS: dict[str, Callable[[], str]] = {
    part.__name__: part
    for part in (
        settings,
        errors,
        client_errors,
        fields,
        result,
        redis_keys,
        worker_metrics,
        callbacks_metrics,
        queue_metrics,
        wire,
    )
}


def _metrics(definitions: Iterable[Definition]) -> str:
    rows = ["| Metric | Type | Labels | |", "| --- | --- | --- | --- |"]
    for each in definitions:
        labels = ", ".join(f"`{label}`" for label in each.labels)
        rows.append(_row(f"`{each.name}`", each.type, labels, each.meaning))
    return "\n".join(rows)


def _errors(kinds: Iterable[type[IdeficsError]]) -> str:
    rows = ["| Code | Class | Cause and cure | Retried? | HTTP |", "| --- | --- | --- | --- | --- |"]
    for kind in kinds:
        retried = "yes" if kind.retryable else "no"
        rows.append(_row(f"`{kind.code}`", f"`{kind.__name__}`", kind.__doc__ or "", retried, _statuses(kind)))
    return "\n".join(rows)


def _statuses(kind: type[IdeficsError]) -> str:
    others = kind.statuses.items() if issubclass(kind, JobError) else ()
    return "; ".join([str(kind.http_status), *(f"{status} with `{detail}`" for detail, status in others)])


def _fields(schema: Mapping[str, Any], without: set[str]) -> str:
    required = schema.get("required", [])
    rows = ["| Field | Default | |", "| --- | --- | --- |"]
    for name, field in schema["properties"].items():
        if name not in without:
            default = "required" if name in required else _default(field.get("default"))
            rows.append(_row(f"`{name}`", default, field.get("description", "")))
    return "\n".join(rows)


def _described(field: Any, schema: Mapping[str, Any], old_name: str | None) -> str:
    choices = " ".join(f"`{choice}`" for choice in schema.get("enum", []))
    parts = (field.description, choices and f"Choices: {choices}.", old_name and f"Old name: `{old_name}`.")
    return " ".join(filter(None, parts))


def _default(value: Any) -> str:
    return "" if value is None else f"`{json.dumps(value)}`"


def _row(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
