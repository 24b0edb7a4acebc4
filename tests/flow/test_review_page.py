"""The page of `idefics-jobs review` in a real Chromium, at the real command, with a real review list."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tasks.apps import app_at
from tasks.review import RankedAnswer, ReviewBounds, ReviewItem, ReviewList
from tests.support.chromium import LOOPBACK, Browser, chromium, needs_chromium
from tests.support.hostile_text import HOSTILE
from tests.support.pictures import encoded
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack

pytestmark = needs_chromium

BOUNDS = ReviewBounds(items=100, bytes=10_000_000, ttl_s=3_600)
TEAL, ORANGE = (0, 128, 128), (230, 120, 20)
NASTY = f"</script><img src=x onerror=alert(1)>{HOSTILE}".replace("\ud800", "").replace("\udfff", "")
CHOICES = ("cat", "dog", "duck", "car", "tree", "boat", "sun", "tent", "pie")


@pytest.fixture(scope="module")
def server() -> Iterator[stack.Broker]:
    with stack.broker() as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile"), [LOOPBACK]) as browser:
        yield browser


@pytest.fixture
def reviews(server: stack.Broker) -> ReviewList:
    server.connect(1).flushdb()
    return ReviewList(app_at(server.url, server.results))


@pytest.fixture
def tab(browser: Browser) -> Browser:
    browser.show(1280, 900)
    browser.forget()
    return browser


def _jpeg(color: tuple[int, int, int]) -> bytes:
    return encoded(Image.new("RGB", (320, 240), color), "JPEG", quality=95)


def _put(reviews: ReviewList, id: str, *, pictures: int = 1, **changed: Any) -> None:
    """Put an item on the list as a worker does; later calls put later items."""
    answers = tuple(RankedAnswer(text, 0.4 / (place + 1)) for place, text in enumerate(CHOICES))
    told = {"asked": f"What is {id}?", "answers": answers, "metadata": {}, "created": time.time(), **changed}
    item = ReviewItem(
        id=id, task="idefics.answer", confidence=0.4, min_confidence=0.6, pictures=pictures, answer="cat", **told
    )
    assert reviews.put(item, [_jpeg((TEAL, ORANGE)[index % 2]) for index in range(pictures)], BOUNDS)


@contextmanager
def _command(server: stack.Broker) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command, and the address that it prints."""
    environment = {**os.environ, "IDEFICS_BROKER_URL": server.url, "IDEFICS_RESULT_BACKEND": server.results}
    command = [sys.executable, "-m", "tasks", "review", "--port", "0"]
    with subprocess.Popen(
        command, cwd=stack.CHECKOUT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().removeprefix("Open ").strip()
        finally:
            process.kill()


def _end(process: subprocess.Popen[str]) -> str:
    """End the command as Ctrl-C does; what it says then."""
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    return said.strip()


def _opened(tab: Browser, address: str) -> None:
    tab.open(address)
    tab.wait("document.documentElement.dataset.drawn")


def _text(tab: Browser, id: str) -> str:
    return str(tab.run(f"document.getElementById('{id}').textContent"))


def _await(tab: Browser, id: str, text: str) -> None:
    tab.wait(f"document.getElementById('{id}').textContent.includes({text!r})")


def _decided(reviews: ReviewList) -> dict[str, str | None]:
    return {decision.id: decision.answer for _, decision in reviews.decisions()}


def _center(tab: Browser, selector: str) -> tuple[int, int]:
    box = tab.run(f"document.querySelector({selector!r}).getBoundingClientRect().toJSON()")
    return int(box["x"] + box["width"] / 2), int(box["y"] + box["height"] / 2)


def _is_near(shot: Image.Image, place: tuple[int, int], color: tuple[int, int, int]) -> bool:
    found = shot.getpixel(place)
    assert isinstance(found, tuple)
    return max(abs(a - b) for a, b in zip(found, color, strict=True)) < 12


def test_a_person_decides_with_keys_alone(server: stack.Broker, reviews: ReviewList, tab: Browser) -> None:
    for number in range(1, 10):
        _put(reviews, f"j{number}")
    for id in ("written", "unknown", "skipped"):
        _put(reviews, id)
    with _command(server) as (process, address):
        _opened(tab, address)
        assert _text(tab, "progress") == "12 left · 0 decided in this session"
        for number in range(1, 10):
            _await(tab, "asked", f"What is j{number}?")
            # The next one's picture is here before it is shown, and a key that is held down decides nothing more.
            later = f"id=j{number + 1}&" if number < 9 else "id=written&"
            eventually(lambda later=later: any(later in url for url in tab.requests))
            tab.press(str(number))
            tab.press(str(number), is_held=True)
            tab.wait(f"document.getElementById('progress').textContent.startsWith('{12 - number} left')")
        assert _decided(reviews) == {f"j{number}": CHOICES[number - 1] for number in range(1, 10)}

        _await(tab, "asked", "What is written?")
        tab.press("e")
        assert tab.run("document.activeElement.id") == "field"
        # Keys are text there.
        tab.type("9 suns")
        tab.press("Enter")
        _await(tab, "asked", "What is unknown?")
        tab.press("-")
        _await(tab, "notice", "Saved: cannot tell.")
        tab.press("u")
        _await(tab, "notice", "Undone: cannot tell.")
        assert "unknown" not in _decided(reviews)
        tab.press("s")
        _await(tab, "asked", "What is skipped?")
        tab.press(" ")
        _await(tab, "asked", "What is unknown?")
        tab.press("0")
        _await(tab, "asked", "What is skipped?")
        tab.press("Tab")
        tab.press("Tab")
        assert tab.run("document.activeElement.getAttribute('aria-keyshortcuts')") == "2"
        tab.press("Enter")
        tab.wait("!document.getElementById('empty').hidden")
        assert _text(tab, "progress") == "0 left · 12 decided in this session"
        assert _decided(reviews) | {"j1": "cat"} == {
            **{f"j{number}": CHOICES[number - 1] for number in range(1, 10)},
            "written": "9 suns",
            "unknown": None,
            "skipped": "dog",
        }
        # What comes later is shown by itself.
        _put(reviews, "later")
        _await(tab, "asked", "What is later?")
        assert (tab.errors, tab.violations, tab.dialogs) == ([], [], [])
        assert _end(process) == "12 decisions, 1 of them “cannot tell”."


def test_pictures_and_hostile_text_are_shown_and_run_nothing(
    server: stack.Broker, reviews: ReviewList, tab: Browser, tmp_path: Path
) -> None:
    answers = (RankedAnswer(NASTY, 0.5), RankedAnswer("w" * 3_000, 0.3), RankedAnswer("", None))
    _put(reviews, "j1", pictures=3, asked=NASTY, answers=answers, metadata={NASTY: NASTY, "__proto__": "x"})
    with _command(server) as (process, address):
        for width, height, is_dark in ((1280, 900, False), (360, 780, True)):
            tab.show(width, height, dark=is_dark)
            _opened(tab, address)
            tab.wait("[...document.querySelectorAll('#pictures img')].filter((one) => one.naturalWidth).length === 4")
            shot = tab.screenshot()
            assert _is_near(shot, _center(tab, "#pictures .large img"), TEAL)
            assert _is_near(shot, _center(tab, ".strip button:nth-child(2)"), ORANGE)
            tab.press("ArrowRight")
            tab.wait("document.querySelector('.large img').alt === 'Picture 2 of 3'")
            assert _is_near(tab.screenshot(), _center(tab, "#pictures .large img"), ORANGE)
            assert tab.run("document.documentElement.scrollWidth") <= width
            assert sum(shot.getpixel((2, height - 2))) < 200 or not is_dark  # type: ignore[arg-type]
        tab.run("document.getElementById('more').open = true")
        assert "\u202e" not in tab.run("document.body.innerText")
        assert "onerror=alert(1)" in _text(tab, "asked")
        assert tab.run("document.querySelectorAll('main script, main img[onerror]').length") == 0
        assert tab.run("document.querySelector('.answer').textContent").startswith("1</script>")
        tab.press("1")
        tab.wait("!document.getElementById('empty').hidden")
        assert (tab.errors, tab.violations, tab.dialogs) == ([], [], [])
        assert _decided(reviews) == {"j1": NASTY}
        assert all(url.startswith((address.partition("?")[0], "blob:", "data:,")) for url in tab.requests)
        # The page without its token, in the same browser.
        tab.open(address.partition("?")[0])
        assert "Open the address" in tab.run("document.body.textContent")
        assert _end(process) == "1 decision."


def test_no_decision_is_lost_if_another_is_first_or_redis_or_the_command_is_away(
    server: stack.Broker, reviews: ReviewList, tab: Browser
) -> None:
    for number in range(1, 4):
        _put(reviews, f"j{number}")
    with _command(server) as (process, address):
        _opened(tab, address)
        assert reviews.decide("j1", "tent")
        tab.press("2")
        _await(tab, "notice", "Another reviewer was first.")
        _await(tab, "asked", "What is j2?")
        assert _decided(reviews) == {"j1": "tent"}

        with server.connect() as redis:
            # As a server that is away: each connection is refused its commands.
            redis.config_set("maxclients", 1)
            for client in redis.client_list():
                if client["id"] != str(redis.client_id()):
                    redis.client_kill_filter(_id=client["id"])
            tab.press("3")
            _await(tab, "problem", "Not saved: duck.")
            assert _text(tab, "asked") == "What is j2?"
            assert tab.run("document.querySelector('[aria-pressed=true] kbd').textContent") == "3"
            redis.config_set("maxclients", 1_000)
        tab.run("document.querySelector('#problem button').click()")
        _await(tab, "asked", "What is j3?")
        assert _text(tab, "problem") == ""
        assert _decided(reviews) == {"j1": "tent", "j2": "duck"}

        assert _end(process) == "1 decision."
        tab.press("1")
        _await(tab, "problem", "Not saved: cat. The command idefics-jobs review does not answer.")
        # Leaving the page would ask for leave while a decision is not saved.
        tab.press("s")
    assert _decided(reviews) == {"j1": "tent", "j2": "duck"}
