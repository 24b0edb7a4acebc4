"""An evaluation or a comparison as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..page import BASE_SCRIPTS, BASE_STYLES, document, part
from . import ComparedOutputs, EvaluatedOutput
from .intervals import Estimate
from .labels import LabelFigures
from .rows import JudgedRow
from .wording import (
    NAMES,
    chance,
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


def evaluation_page(found: EvaluatedOutput, title: str, thumbnails: Mapping[int, str]) -> str:
    """The page of one output: its numbers, and its worst mistakes with the pictures.

    Args:
        found: With up to `MOST_ROWS` mistakes.
        title: What was evaluated, such as the output's name.
        thumbnails: Pictures by the rows' numbers, as `data:` URIs.
    """
    figures = found.figures
    estimates = [(name, getattr(figures, name, None)) for name in NAMES]
    is_by_score = bool(found.mistakes) and found.mistakes[0].score is not None
    data: dict[str, Any] = {
        "tiles": [_tile(name, each) for name, each in estimates if each is not None],
        "notes": [rows_told(figures.rows, figures.unanswered, found.without_truth), _INTERVALS],
        "heading": "Mistakes, the most confident first" if is_by_score else "Mistakes",
        "of": found.wrong,
        "items": [_item(row, thumbnails, {"Answer": row}) for row in found.mistakes],
    }
    if isinstance(figures, LabelFigures):
        told = figures.as_dict()
        data.update({name: told[name] for name in ("classes", "confusion", "calibration")})
    return _page(title, data, thumbnails)


def comparison_page(found: ComparedOutputs, title: str, thumbnails: Mapping[int, str]) -> str:
    """The page of two outputs: which is better, and the rows where one is right and the other is not.

    Args:
        found: With up to `MOST_ROWS` differing rows.
        title: What was compared.
        thumbnails: Pictures by the rows' numbers in A, as `data:` URIs.
    """
    told = found.comparison
    main = told.differences[told.headline]
    data: dict[str, Any] = {
        "tiles": [
            _tile(NAMES[told.headline] + " of A", main.a),
            _tile(NAMES[told.headline] + " of B", main.b),
            {
                "name": "B less A, in points",
                "value": points(main.difference.value),
                "note": interval_in_points(main.difference),
            },
        ],
        "notes": [
            *pairs_told(told.rows, told.answered, told.only_in_a, told.only_in_b, found.without_truth),
            _INTERVALS,
        ],
        "verdict": verdict(told.headline, main),
        "differences": [
            [
                NAMES[name], percent(each.a.value), percent(each.b.value), points(each.difference.value),
                interval_in_points(each.difference), chance(each.p_value), str(each.only_a_right),
                str(each.only_b_right),
            ]
            for name, each in told.differences.items()
        ],
        "heading": "Rows where one is right and the other is not",
        "of": main.only_a_right + main.only_b_right,
        "items": [_item(pair.a, thumbnails, {"A": pair.a, "B": pair.b}) for pair in found.differing],
    }  # fmt: skip
    return _page(title, data, thumbnails)


_INTERVALS = "Intervals are 95 %, by the bootstrap over these rows."


def _page(title: str, data: dict[str, Any], thumbnails: Mapping[int, str]) -> str:
    styles = [*map(part, BASE_STYLES), part("page.css", __package__)]
    scripts = [*map(part, BASE_SCRIPTS), part("page.js", __package__)]
    told = {"title": title, "has_pictures": bool(thumbnails), **data}
    return document(title, part("page.html", __package__), told, styles, scripts)


def _tile(name: str, each: Estimate) -> dict[str, str]:
    return {"name": NAMES.get(name, name), "value": percent(each.value), "note": interval(each)}


def _item(row: JudgedRow, thumbnails: Mapping[int, str], answers: Mapping[str, JudgedRow]) -> dict[str, Any]:
    return {
        "id": row.id,
        "truth": " | ".join(row.truths),
        "answers": [
            {"name": name, "text": each.answer, "is_right": each.match.is_normalised, "score": each.score}
            for name, each in answers.items()
        ],
        "thumb": thumbnails.get(row.number),
    }
