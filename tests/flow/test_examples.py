"""The examples run as a reader runs them, beside a broker and a worker with the bundled model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flow.conftest import PATIENCE_S, eventually
from worker.demo import stack

EXAMPLES = stack.CHECKOUT / "examples"
CAPTION = "A cat on a blue background."

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def environment(demo_broker: stack.Broker) -> dict[str, str]:
    """That of a reader whose broker is elsewhere."""
    return {**os.environ, "BROKER_URL": demo_broker.url, "RESULT_BACKEND": demo_broker.results}


def lines(program: list[str | Path], environment: dict[str, str], folder: Path) -> list[str]:
    """What a program prints that ends well."""
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


# --- examples/celery ------------------------------------------------------------------------------


def test_a_plain_celery_app_uses_canvas_times_and_priorities(environment: dict[str, str], tmp_path: Path) -> None:
    environment |= {"SAVED": str(tmp_path / "saved.jsonl")}
    folder, log = EXAMPLES / "celery", tmp_path / "log"
    celery = [sys.executable, "-m", "celery", "--workdir", str(folder), "-A", "app", "worker"]
    celery += ["--hostname", "gallery@%h", "--pool", "solo", "--loglevel", "INFO"]
    with stack.started(celery, log=log, environment=environment) as process:
        stack.await_line(process, log, " ready.", PATIENCE_S)
        colour, *gallery, soon, at, urgent, nightly, code = lines([sys.executable, "app.py"], environment, folder)
        assert colour == "Blue."
        assert [line.partition(": ")[0] for line in gallery] == ["cat.png", "duck.png", "pizza.png"]
        assert gallery[0] == f"cat.png: {CAPTION}"
        assert {soon, at, urgent, nightly} == {CAPTION}
        assert code == "image_invalid"
        eventually(lambda: len((tmp_path / "saved.jsonl").read_text().splitlines()) == 3)
    saved = [json.loads(line) for line in (tmp_path / "saved.jsonl").read_text().splitlines()]
    assert [each["title"] for each in saved] == ["caption", "colour", "image_invalid"]
    assert [each["text"] for each in saved[:2]] == [CAPTION, "Blue."]
