"""The report in a real Chromium: it is drawn, can be searched and filtered, and hostile text stays text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tasks.campaign.plan import Plan
from tasks.campaign.report import write_report
from tasks.errors import DeadlineExceeded, ImageUnreachable, InvalidRequest
from tests.support.campaign_output import answered, write_output
from tests.support.chromium import Browser, chromium, needs_chromium
from tests.support.hostile_text import HOSTILE
from tests.support.pictures import data_uri, png

pytestmark = needs_chromium

#: The page's own colors in light and dark: a good bar, a bad one.
GOOD, BAD, DARK_PAGE = (0x24, 0x63, 0xC9), (0xC8, 0x41, 0x0B), (0x0E, 0x11, 0x16)
ROWS = 300
MANY = 6_000


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def tab(browser: Browser) -> Browser:
    browser.show(1280, 900)
    browser.forget()
    return browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a campaign of 300 rows; each tenth has failed."""
    folder = tmp_path_factory.mktemp("report")
    rows = [
        {"sku": f"s{row}", "name": f"Photo {row}", "url": f"https://cdn{row % 3}.example/{row}.jpg"}
        for row in range(1, ROWS + 1)
    ]
    for row in rows[::2]:
        row["url"] = data_uri(png("teal"))
    return _report(folder, rows, _outcome)


def _outcome(row: int) -> Any:
    if row % 10 == 0:
        return (DeadlineExceeded if row % 20 else ImageUnreachable)(f"Row {row} was too slow.")
    return answered("duck" if row % 3 else "cat", (row % 100) / 100, seconds=1 + row / 100)


def _report(folder: Path, rows: list[dict[str, Any]], outcome_of: Callable[[int], Any], **options: Any) -> Path:
    write_output(folder / "out.csv", rows, outcome_of, **options)
    write_report(str(folder / "out.csv"), str(folder / "out.html"))
    return folder / "out.html"


def _opened(tab: Browser, page: Path) -> Browser:
    tab.open(page)
    tab.wait("document.documentElement.dataset.drawn && document.querySelector('svg rect')")
    assert tab.errors == []
    return tab


def _found(tab: Browser) -> str:
    return str(tab.run("document.getElementById('found').textContent"))


def _shown_ids(tab: Browser) -> list[str]:
    return list(tab.run("[...document.querySelectorAll('.item .foot span:first-child')].map((one) => one.textContent)"))


def _search(tab: Browser, text: str) -> None:
    tab.run("document.querySelector('input[type=search]').focus()")
    tab.type(text)


def _choose(tab: Browser, label: str, value: str) -> None:
    tab.run(
        f"(() => {{ const box = [...document.querySelectorAll('.toolbar label')]"
        f".find((one) => one.firstChild.data === {label!r}).querySelector('select'); box.value = {value!r};"
        " box.dispatchEvent(new Event('change')); })()"
    )


def _share(shot: Image.Image, color: tuple[int, int, int]) -> float:
    """The part of a picture that has a color, give or take what smoothing changes."""
    colors = shot.getcolors(shot.width * shot.height) or []
    near = sum(count for count, found in colors if max(abs(a - b) for a, b in zip(found, color, strict=True)) < 12)
    return near / (shot.width * shot.height)


def _box(tab: Browser, selector: str) -> tuple[int, int, int, int]:
    """Where an element stands in the window: left, top, right, bottom."""
    box = tab.run(f"document.querySelector({selector!r}).getBoundingClientRect().toJSON()")
    return int(box["left"]), int(box["top"]), int(box["right"]), int(box["bottom"])


def test_the_page_is_drawn_and_loads_nothing(tab: Browser, page: Path) -> None:
    _opened(tab, page)
    title, tiles = tab.run("[document.querySelector('h1').textContent, document.getElementById('tiles').textContent]")
    assert title == "out.csv"
    assert tiles.startswith("300rows270answered, 90.0%30failed, 10.0%")
    assert {url.partition(",")[0] for url in tab.requests} == {page.as_uri(), "data:image/webp;base64"}
    assert tab.violations == []


def test_its_plots_have_bars_in_their_colors(tab: Browser, page: Path) -> None:
    tab.show(1280, 1500)
    shot = _opened(tab, page).screenshot()
    assert shot.size == (1280, 1500)
    assert len(set(shot.resize((64, 64)).getdata())) > 50
    for plot, colors in {"#rate": (GOOD, BAD), "#latency": (GOOD,), "#scores": (GOOD,), "#codes": (BAD,)}.items():
        for color in colors:
            assert _share(shot.crop(_box(tab, plot)), color) > 0.01, plot
    # The scores are spread evenly: bars fill the plot from side to side.
    left, top, right, bottom = _box(tab, "#scores svg")
    middle = shot.crop((left + 80, (top + bottom) // 2, right - 30, (top + bottom) // 2 + 8))
    assert _share(middle, GOOD) > 0.7
    axis = tab.run("[...document.querySelectorAll('#scores svg text')].map((one) => one.textContent)")
    assert {"rows", "score", "0", "0.2", "1"} <= set(axis)


def test_a_few_rows_have_axes_too(tab: Browser, tmp_path: Path) -> None:
    page = _report(tmp_path, [{"sku": "a", "url": "a.png"}], lambda _: answered("cat", 0.5))
    _opened(tab, page)
    assert "1 s" in tab.run("[...document.querySelectorAll('#latency svg text')].map((one) => one.textContent)")
    assert tab.run("document.querySelectorAll('#latency rect').length") == 1


def test_it_is_dark_for_those_who_prefer_it(tab: Browser, page: Path) -> None:
    tab.show(1280, 900, dark=True)
    shot = _opened(tab, page).screenshot()
    assert _share(shot, DARK_PAGE) > 0.1
    assert sum(shot.resize((1, 1)).getpixel((0, 0))) < 3 * 80


def test_it_fits_a_phone(tab: Browser, page: Path) -> None:
    tab.show(360, 780)
    _opened(tab, page)
    assert tab.run("document.documentElement.scrollWidth") <= 360
    assert tab.run("Math.min(...[...document.querySelectorAll('#plots .card')].map((one) => one.clientWidth))") > 300


def test_a_search_finds_rows_by_any_of_their_texts(tab: Browser, page: Path) -> None:
    _opened(tab, page)
    assert _found(tab).startswith("300 rows")
    _search(tab, "photo 123")
    assert _found(tab) == "1 of 300 rows"
    assert _shown_ids(tab) == ["s123"]
    tab.run("document.getElementById('clear').click()")
    _search(tab, "TOO slow")
    assert _found(tab) == "30 of 300 rows"
    tab.run("document.getElementById('clear').click()")
    _search(tab, "nothing has this")
    assert "No row has all of this" in tab.run("document.getElementById('items').textContent")


def test_filters_and_orders_work_together(tab: Browser, page: Path) -> None:
    _opened(tab, page)
    _choose(tab, "Outcome", "code:image_unreachable")
    assert _found(tab) == "15 of 300 rows"
    _choose(tab, "Outcome", "answered")
    _choose(tab, "Label", "cat")
    assert _found(tab).startswith("90 of 300 rows")
    _choose(tab, "Order", "low")
    tab.run("document.querySelector('input[aria-label=\"Lowest score\"]').focus()")
    tab.type("0.9")
    assert set(_shown_ids(tab)) == {"s93", "s96", "s99", "s192", "s195", "s198", "s291", "s294", "s297"}
    assert _shown_ids(tab)[0] == "s291"


def test_a_bar_filters_the_rows(tab: Browser, page: Path) -> None:
    _opened(tab, page)
    tab.run("document.querySelector('#codes button').click()")
    assert _found(tab).startswith("15 of 300 rows")
    tab.run("document.getElementById('clear').click()")
    tab.run("document.querySelector('#scores [role=button]:last-of-type').focus()")
    tab.press("Enter")
    scores = tab.run("[...document.querySelectorAll('.meter')].map((one) => Number(one.textContent))")
    assert scores
    assert all(0.95 <= score <= 1 for score in scores)


def test_pages_and_single_rows_are_reached_by_the_keyboard(tab: Browser, page: Path) -> None:
    _opened(tab, page)
    assert len(_shown_ids(tab)) == 60
    tab.run("document.querySelector('[aria-label=\"Next page\"]').focus()")
    tab.press("Enter")
    assert _shown_ids(tab)[0] == "s61"
    tab.run("document.querySelector('.item > button').focus()")
    tab.press("Enter")
    assert tab.run("document.querySelector('dialog[open] h2').textContent") == "Row 61"
    tab.press("ArrowRight")
    assert "s62" in tab.run("document.querySelector('dialog[open]').textContent")
    tab.press("Escape")
    tab.wait("!document.querySelector('dialog[open]')")
    tab.wait("document.activeElement.textContent.includes('s62')")


def test_five_thousand_rows_are_there_within_seconds(tab: Browser, tmp_path: Path) -> None:
    rows = [
        {"sku": f"s{row}", "url": f"https://cdn.example/{row}.jpg", "name": f"A photo of a thing {row}"}
        for row in range(MANY)
    ]
    page = _report(tmp_path, rows, _outcome)
    _opened(tab, page)
    assert "5,000 rows (a sample of 6,000)" in _found(tab)
    assert tab.run("document.querySelectorAll('.item').length") == 60
    # Far more than it takes, on a machine that does other things.
    assert tab.run("performance.getEntriesByType('navigation')[0].loadEventEnd") < 15_000
    searched = tab.run(
        "(() => { const began = performance.now(); const box = document.querySelector('input[type=search]');"
        " box.value = 'thing 77'; box.dispatchEvent(new Event('input')); return performance.now() - began; })()"
    )
    assert searched < 3_000
    assert "of 5,000 rows" in _found(tab)


NASTY = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    '"><svg onload=alert(1)>',
    "javascript:alert(1)",
    "data:text/html,<script>alert(1)</script>",
    "data:image/svg+xml;base64,PHN2ZyB4bWxucz0iaHR0cDovL3d3dy53My5vcmcvMjAwMC9zdmciIG9ubG9hZD0iYWxlcnQoMSkiLz4=",
    "https://tracker.example/a.png?<script>",
    "\u202egnp.exe\u2066",
    "w" * 3_000,
    "Z\u0351\u036b\u0343" * 200,
    "__proto__",
    "=cmd|' /C calc'!A0",
    # A half character cannot be part of a worker's answer.
    HOSTILE.replace("\ud800", "").replace("\udfff", ""),
]


def test_hostile_text_stays_text(tab: Browser, tmp_path: Path) -> None:
    plan = Plan(
        task="answer", image="url", id="</title><b>", set={"question": "{</title><b>} <script>alert(1)</script>"}
    )
    rows = [{"</title><b>": text, "url": text, "__proto__": text, "<i onclick=alert(1)>": text} for text in NASTY]
    page = _report(
        tmp_path,
        rows,
        lambda row: InvalidRequest(NASTY[row - 1]) if row % 3 == 0 else answered(NASTY[row - 1], 0.5),
        plan=plan,
        host="<b>host",
    )
    tab.show(390, 844)
    _opened(tab, page)
    for number in range(1, len(NASTY) + 1):
        tab.run(f"document.querySelectorAll('.item > button')[{number - 1}].click()")
        assert tab.run(
            "document.querySelector('dialog').scrollWidth <= document.querySelector('dialog').clientWidth + 1"
        )
        tab.run("document.querySelector('dialog').close()")
    assert tab.run("document.documentElement.scrollWidth") <= 390
    assert tab.run(
        "[...document.querySelectorAll('a')].map((one) => one.protocol).filter((one) => one !== 'https:')"
    ) == ["file:"]
    assert tab.run("document.scripts.length") == 2
    assert (
        tab.run("document.querySelectorAll('main svg[onload], main img[onerror], main b b, main script').length") == 0
    )
    assert "\u202e" not in tab.run("document.body.innerText")
    assert "\\u202egnp.exe\\u2066" in tab.run("document.querySelector('main').textContent")
    tab.run("new Promise((done) => setTimeout(done, 200))")
    assert (tab.dialogs, tab.violations, tab.errors) == ([], [], [])
    assert {url.partition(",")[0] for url in tab.requests} <= {page.as_uri(), "data:image/webp;base64"}


def test_what_got_into_the_page_as_html_could_not_run(tab: Browser, page: Path, tmp_path: Path) -> None:
    """The policy alone holds, should the page's own script ever be wrong."""
    broken = tmp_path / "broken.html"
    inserted = "<main><img src=https://tracker.example/x.png onerror=alert(1)><script>alert(2)</script>"
    broken.write_text(page.read_text().replace("<main>", inserted))
    _opened(tab, broken)
    assert tab.dialogs == []
    assert tab.violations
    assert [url for url in tab.requests if "tracker" in url] == []
