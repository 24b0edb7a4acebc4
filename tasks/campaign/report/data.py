"""A page's data: statistics of all rows of an output, and the rows that it shows. Reads the output twice."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import IdeficsError
from ...urls import host_of
from ..output import NotRun
from ..thumbnails import is_web
from .asked import pictures, prompt
from .columns import OutputColumns
from .rows import Campaign, OutputRow
from .sampling import Sampler
from .statistics import Statistics

#: Characters that are shown of an answer, a prompt or an error; and of any other cell.
MAX_TEXT, MAX_CELL = 4_000, 500
MAX_OTHERS = 60
MAX_SCORES = 20
ANSWERED, FAILED, OPEN = "answered", "failed", "open"
#: A result's timing, in order, as the page names it.
STAGES = {"queued_s": "queue", "fetch_s": "download", "wait_s": "engine wait", "generate_s": "model"}


@dataclass
class Overview:
    """What the first reading finds."""

    statistics: Statistics
    #: Numbers of the rows to show.
    chosen: set[int]


@dataclass
class Shown:
    """What the second reading finds."""

    #: By row, in the page's form.
    items: list[dict[str, Any]] = field(default_factory=list)
    models: Counter[str] = field(default_factory=Counter)
    #: Sums of seconds over the items with a timing, and their number.
    stages: Counter[str] = field(default_factory=Counter)
    timed: int = 0

    def mean_stages(self) -> list[dict[str, Any]] | None:
        if not self.timed:
            return None
        return [{"name": name, "seconds": self.stages[stage] / self.timed} for stage, name in STAGES.items()]


def overview(rows: Iterable[OutputRow], columns: OutputColumns, most: int) -> Overview:
    """Statistics of all rows, and which ones to show: `most` at most."""
    statistics, sampler = Statistics(), Sampler(most)
    for row in rows:
        _count(statistics, row, columns)
        sampler.add(row.number, _code(row, columns))
    return Overview(statistics, sampler.chosen())


def _count(statistics: Statistics, row: OutputRow, columns: OutputColumns) -> None:
    def number(name: str) -> float | None:
        return number_of(columns.value(row.values, name))

    code, host = _code(row, columns), _host(row, columns)
    statistics.rows += 1
    if host is not None:
        statistics.hosts.add(host)
    if row.answer is not None:
        statistics.over_time.add(row.answer.ended, code is not None)
    if code is not None:
        statistics.failed += 1
        statistics.codes.add(code)
        if host is not None:
            statistics.failed_hosts.add(host)
        return
    statistics.answered += _is_answered(row, columns)
    statistics.prompt_tokens += int(number("prompt_tokens") or 0)
    statistics.completion_tokens += int(number("completion_tokens") or 0)
    if (seconds := number("seconds")) is not None:
        statistics.durations.add(seconds)
    if (score := _score(row, columns)) is not None:
        statistics.add_score(score)
    if label := _text(columns.value(row.values, "label"), MAX_CELL):
        statistics.labels.add(label)


def _score(row: OutputRow, columns: OutputColumns) -> float | None:
    """A label's probability, or the answer's confidence where the output has only that."""
    score = number_of(columns.value(row.values, "score"))
    return number_of(columns.value(row.values, "confidence")) if score is None else score


def _code(row: OutputRow, columns: OutputColumns) -> str | None:
    """The error's code; None for a row that has not failed. One that was not run is open."""
    code = _text(columns.value(row.values, "error_code"), MAX_CELL)
    return code if code and code != NotRun.code else None


def _is_answered(row: OutputRow, columns: OutputColumns) -> bool:
    told = (columns.value(row.values, name) for name in ("finish_reason", "text", "label"))
    return any(value not in (None, "") for value in told)


def _host(row: OutputRow, columns: OutputColumns) -> str | None:
    if row.answer is not None and row.answer.host:
        return row.answer.host
    cell = row.values.get(columns.image) if columns.image else None
    return host_of(cell) if isinstance(cell, str) else None


def shown(
    rows: Iterable[OutputRow],
    columns: OutputColumns,
    campaign: Campaign | None,
    see: Callable[[dict[str, Any], Any], None],
) -> Shown:
    """The rows to show. `see` is called with each item and its picture: an address, a data: URI, bytes, a name."""
    found = Shown()
    for row in rows:
        arguments = _arguments(row, campaign)
        picture = _picture(row, columns, arguments)
        item = without_nothing(_item(row, columns, arguments, picture, found))
        see(item, picture)
        found.items.append(item)
    return found


def _arguments(row: OutputRow, campaign: Campaign | None) -> Mapping[str, Any]:
    """What the row's job asked; nothing where that cannot be found out."""
    if campaign is None:
        return {}
    try:
        return campaign.plan.job(row.source if row.source is not None else row.values).arguments()
    except IdeficsError:
        # The row was refused, or its picture is not where it was.
        return {}


def _picture(row: OutputRow, columns: OutputColumns, arguments: Mapping[str, Any]) -> Any:
    sent = pictures(arguments)
    return sent[0] if sent else row.values.get(columns.image) if columns.image else None


def _address(row: OutputRow, columns: OutputColumns, picture: Any) -> Any:
    """What tells a picture to people: its address, the name of its file, or what else the cell has."""
    cell = row.values.get(columns.image) if columns.image else None
    is_plain = isinstance(picture, str) and is_web(picture)
    return picture if is_plain or cell in (None, "") else cell


def _item(
    row: OutputRow, columns: OutputColumns, arguments: Mapping[str, Any], picture: Any, found: Shown
) -> dict[str, Any]:
    def value(name: str) -> Any:
        return columns.value(row.values, name)

    code = _code(row, columns)
    tokens = [number_of(value("prompt_tokens")), number_of(value("completion_tokens"))]
    others = [_text(row.values.get(name), MAX_CELL) for name in columns.others[:MAX_OTHERS]]
    return {
        "row": row.number,
        "id": _text(row.values.get(columns.id), MAX_CELL) if columns.id else None,
        "state": FAILED if code else ANSWERED if _is_answered(row, columns) else OPEN,
        "image": _text(_address(row, columns, picture), MAX_TEXT),
        "more": max(len(pictures(arguments)) - 1, 0) or None,
        "host": _host(row, columns),
        "prompt": _text(prompt(arguments), MAX_TEXT),
        "answer": _text(value("text"), MAX_TEXT),
        "label": _text(value("label"), MAX_CELL),
        "score": _score(row, columns),
        "code": code,
        "error": _text(value("error"), MAX_TEXT) if code else None,
        "finish": _text(value("finish_reason"), MAX_CELL),
        "seconds": number_of(value("seconds")),
        "tokens": tokens if None not in tokens else None,
        "others": others if any(others) else None,
        **_stored(row, found),
    }


def _stored(row: OutputRow, found: Shown) -> dict[str, Any]:
    """What the state has of an answer beyond the output's columns."""
    if row.answer is None:
        return {}
    told: dict[str, Any] = {"job": row.answer.job or None, "ended": row.answer.ended}
    if row.answer.code is not None:
        return told
    result = json.loads(row.answer.answer)
    found.models[_model(result.get("model", {}))] += 1
    timing = result.get("timing", {})
    if all(number_of(timing.get(stage)) is not None for stage in STAGES):
        found.timed += 1
        found.stages.update({stage: timing[stage] for stage in STAGES})
    scores = sorted((result.get("scores") or {}).items(), key=lambda pair: -pair[1])[:MAX_SCORES]
    return {**told, "scores": [[_text(label, MAX_CELL), score] for label, score in scores] or None}


def _model(model: Mapping[str, Any]) -> str:
    kind = ", ".join(str(model[name]) for name in ("family", "dtype", "quantization") if model.get(name))
    return f"{model.get('id')} ({kind})" if kind else str(model.get("id"))


def number_of(value: Any) -> float | None:
    """A finite number, also from a CSV's text; None for anything else."""
    if value is None or value == "" or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _text(value: Any, most: int) -> str | None:
    """A cell's text, cut; of a picture in the cell only what it is."""
    if value is None:
        return None
    if isinstance(value, bytes | bytearray | memoryview):
        return f"({len(bytes(value)):,} bytes)"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=_short)
    if text[:5].lower() == "data:" and len(text) > MAX_CELL:
        return f"{text[:40]}… ({len(text):,} characters)"
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _short(value: Any) -> str:
    return f"({len(value):,} bytes)" if isinstance(value, bytes) else str(value)


def without_nothing(item: Mapping[str, Any]) -> dict[str, Any]:
    """An item without its empty values: in 5,000 of them names of fields count."""
    return {name: value for name, value in item.items() if value is not None and value != ""}
