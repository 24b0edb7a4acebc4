"""An evaluation or a comparison as one self-contained HTML page. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...page import BASE_SCRIPTS, BASE_STYLES, document, part
from . import ComparedOutputs, EvaluatedOutput
from .intervals import Estimate
from .labels import LabelFigures
from .rows import JudgedRow
from .wording import (
    DIFFERENCE_COLUMNS,
    NAMES,
    difference_cells,
    interval,
    interval_in_points,
    pairs_told,
    percent,
    points,
    rows_told,
    verdict,
)

#: Rows that a page shows at most.
MOST_ROWS = 200
_INTERVALS = "Intervals are 95 %, by the bootstrap over these rows."


def page_data(found: EvaluatedOutput | ComparedOutputs, title: str) -> dict[str, Any]:
    """What the page shows, as JSON: the numbers, and in `items` the rows to look at, as `shown_rows` gives them.

    An item that is given a `thumb`, a small picture as a `data:` URI, is shown with it.
    """
    data = _evaluation(found) if isinstance(found, EvaluatedOutput) else _comparison(found)
    return {"title": title, **data}


def shown_rows(found: EvaluatedOutput | ComparedOutputs) -> list[JudgedRow]:
    """The rows of `page_data`'s items: the worst mistakes, or A's rows where one is right and the other is not."""
    rows = found.mistakes if isinstance(found, EvaluatedOutput) else [pair.a for pair in found.differing]
    return rows[:MOST_ROWS]


def page(data: Mapping[str, Any]) -> str:
    """The page of `page_data`."""
    styles = [*map(part, BASE_STYLES), part("page.css", __package__)]
    scripts = [*map(part, BASE_SCRIPTS), part("page.js", __package__)]
    return document(f"{data['title']}: evaluation", part("page.html", __package__), data, styles, scripts)


def _evaluation(found: EvaluatedOutput) -> dict[str, Any]:
    figures = found.figures
    estimates = [(name, getattr(figures, name, None)) for name in NAMES]
    rows = shown_rows(found)
    data: dict[str, Any] = {
        "tiles": [_tile(NAMES[name], each) for name, each in estimates if each is not None],
        "notes": [rows_told(figures.rows, figures.unanswered, found.without_truth), _INTERVALS],
        "heading": "Mistakes, the most confident first" if rows and rows[0].score is not None else "Mistakes",
        "of": found.wrong,
        "items": [_item(row, {"Answer": row}) for row in rows],
    }
    if isinstance(figures, LabelFigures):
        told = figures.as_dict()
        data.update({name: told[name] for name in ("classes", "confusion", "calibration")})
    return data


def _comparison(found: ComparedOutputs) -> dict[str, Any]:
    told = found.comparison
    main, name = told.differences[told.headline], NAMES[told.headline]
    gain = {
        "name": "B less A, in points",
        "value": points(main.difference.value),
        "note": interval_in_points(main.difference),
    }
    counted = pairs_told(told.rows, told.answered, told.only_in_a, told.only_in_b, found.without_truth)
    return {
        "tiles": [_tile(f"{name} of A", main.a), _tile(f"{name} of B", main.b), gain],
        "notes": [*counted, _INTERVALS],
        "verdict": verdict(told.headline, main),
        "differences": [difference_cells(name, each) for name, each in told.differences.items()],
        "columns": DIFFERENCE_COLUMNS,
        "heading": "Rows where one is right and the other is not",
        "of": main.only_a_right + main.only_b_right,
        "items": [_item(pair.a, {"A": pair.a, "B": pair.b}) for pair in found.differing[:MOST_ROWS]],
    }


def _tile(name: str, each: Estimate) -> dict[str, str]:
    return {"name": name, "value": percent(each.value), "note": interval(each)}


def _item(row: JudgedRow, answers: Mapping[str, JudgedRow]) -> dict[str, Any]:
    return {
        "id": row.id,
        "truth": " | ".join(row.truths),
        "answers": [
            {"name": name, "text": each.answer, "is_right": each.match.is_normalised, "score": each.score}
            for name, each in answers.items()
        ],
    }
