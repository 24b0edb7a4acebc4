"""An evaluation's page in a real Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.campaign.evaluation import Columns, compare, evaluate, find_columns
from tasks.campaign.evaluation.page import page, page_data, shown_rows
from tests.support.chromium import Browser, chromium, needs_chromium
from tests.support.hostile_text import HOSTILE
from tests.support.pictures import data_uri, png

NASTY = f"<img src=x onerror=alert(1)></script><script>alert(2)</script>{HOSTILE}"
#: Two cats are right, a dog is taken for a cat, a nasty one for a nastier one, one has no answer.
ROWS: list[dict[str, Any]] = [
    {"truth": "cat", "label": "cat", "score": 0.95},
    {"truth": "cat", "label": "cat", "score": 0.85},
    {"truth": "dog", "label": "cat", "score": 0.75},
    {"truth": NASTY, "label": f"{NASTY}!", "score": 0.55},
    {"truth": "dog", "label": None, "score": None},
]
BETTER = [*ROWS[:2], {"truth": "dog", "label": "dog", "score": 0.6}, *ROWS[3:]]
COLUMNS = find_columns(["truth", "label", "score"], Columns("truth"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        browser.show(1200, 900)
        yield browser


def _opened(browser: Browser, folder: Path, data: dict[str, Any]) -> None:
    path = folder / "page.html"
    path.write_text(page(data), encoding="utf-8")
    browser.open(path)
    browser.wait("document.documentElement.dataset.drawn")
    assert (browser.errors, browser.violations, browser.dialogs) == ([], [], [])


def _texts(browser: Browser, selector: str) -> list[str]:
    return list(browser.run(f"[...document.querySelectorAll({selector!r})].map((one) => one.textContent)"))


@needs_chromium
def test_the_page_of_an_output_shows_its_numbers_and_mistakes(browser: Browser, tmp_path: Path) -> None:
    data = page_data(evaluate(ROWS, COLUMNS), "labels.csv")
    data["items"][0]["thumb"] = data_uri(png("red"))
    _opened(browser, tmp_path, data)
    assert _texts(browser, "h1") == ["labels.csv"]
    assert _texts(browser, ".tile b")[:2] == ["40.0 %", "50.0 %"]
    columns = _texts(browser, "#confusion thead th")
    assert (columns[2:4], columns[-1]) == (["cat", "dog"], "(no answer)")
    assert _texts(browser, "#confusion tbody tr:nth-child(3) > *") == ["dog", "0", "1", "0", "0", "1"]
    assert len(_texts(browser, "#calibration circle")) == 4
    assert _texts(browser, ".item:first-child dd") == ["3", "dog", "✗ cat (0.750)"]
    assert browser.run("document.querySelector('.item img').naturalWidth") == 8
    box = browser.run("(({x, y}) => [x + 100, y + 80])(document.querySelector('.shot').getBoundingClientRect())")
    assert browser.screenshot(whole=True).getpixel(tuple(map(round, box))) == (255, 0, 0)


@needs_chromium
def test_hostile_text_is_shown_as_text(browser: Browser, tmp_path: Path) -> None:
    before = len(browser.requests)
    _opened(browser, tmp_path, page_data(evaluate(ROWS, COLUMNS), NASTY))
    assert browser.run("document.querySelectorAll('img, iframe, script[src]').length") == 0
    assert any("<img src=x onerror=alert(1)></script>" in text for text in _texts(browser, ".item dd"))
    assert [url for url in browser.requests[before:] if not url.startswith(("file:", "data:"))] == []


@needs_chromium
def test_the_page_of_two_outputs_shows_where_they_differ(browser: Browser, tmp_path: Path) -> None:
    found = compare(ROWS, BETTER, COLUMNS, COLUMNS)
    _opened(browser, tmp_path, page_data(found, "A and B"))
    assert _texts(browser, ".tile b") == ["40.0 %", "60.0 %", "+20.0"]
    assert _texts(browser, ".verdict") == [
        "B less A in accuracy: +20.0 points (95 %: +0.0 to +60.0), p = 1.000 by McNemar's exact test. "
        "No difference can be told."
    ]
    assert _texts(browser, ".item dd") == ["3", "dog", "✗ cat (0.750)", "✓ dog (0.600)"]
    assert [row.number for row in shown_rows(found)] == [3]


@needs_chromium
def test_the_page_of_texts_has_no_matrix(browser: Browser, tmp_path: Path) -> None:
    rows = [{"truth": "two cats", "text": "2 cats."}, {"truth": "a dog", "text": "a cat"}]
    columns = find_columns(["truth", "text"], Columns("truth"))
    _opened(browser, tmp_path, page_data(evaluate(rows, columns), "texts.csv"))
    assert _texts(browser, ".tile span")[:2] == ["exact match", "exact match, answered rows only"]
    assert _texts(browser, "#plots table") == []
    assert _texts(browser, ".item dd") == ["2", "a dog", "✗ a cat"]
