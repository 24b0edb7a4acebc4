"""The examples run as a reader runs them, beside a broker and a worker with the bundled model."""

from __future__ import annotations

import base64
import json
import os
import re
import runpy
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from celery import Celery

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


# --- examples/wire --------------------------------------------------------------------------------


def test_a_producer_without_celery_gets_a_caption_and_a_code(environment: dict[str, str], tmp_path: Path) -> None:
    producer: list[str | Path] = [sys.executable, EXAMPLES / "wire" / "producer.py"]
    assert lines([*producer, EXAMPLES / "pictures" / "cat.png"], environment, tmp_path) == [CAPTION]
    (tmp_path / "text.png").write_text("no picture")
    refused = subprocess.run([*producer, tmp_path / "text.png"], env=environment, capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr.startswith("image_invalid: ")


def test_the_bytes_that_the_protocol_prints_are_a_job(demo_broker: stack.Broker) -> None:
    protocol = (EXAMPLES / "wire" / "README.md").read_text()
    message, body = re.findall(r"^```json\n(.*)\n```$", protocol, re.MULTILINE)
    assert base64.b64decode(json.loads(message)["body"]).decode() == body
    id = json.loads(message)["headers"]["id"]
    key = "celery-task-meta-"
    assert f"`{key}<id>`" in protocol
    with demo_broker.connect() as broker, demo_broker.connect(1) as results:
        broker.lpush("idefics\x06\x165", message.encode())
        eventually(lambda: b'"SUCCESS"' in (results.get(f"{key}{id}") or b""))
        record = json.loads(results.get(f"{key}{id}"))
        assert record["result"]["text"].strip()
        assert 86_000 < results.ttl(f"{key}{id}") <= 86_400


def test_the_producer_ranks_as_celery_does(broker: stack.Broker) -> None:
    producer = runpy.run_path(str(EXAMPLES / "wire" / "producer.py"))
    app = Celery(broker=broker.url, set_as_current=False)
    app.conf.broker_transport_options = {"priority_steps": list(range(10))}
    queue = producer["Redis"](broker.url)
    for priority in (0, 5, 9):
        app.send_task("idefics.caption", queue="idefics", priority=priority)
        producer["submit"](queue, "idefics.caption", {}, priority)
        with broker.connect() as told:
            # The newest is first.
            ours, celerys = map(json.loads, told.lrange(producer["queue_list"](priority), 0, -1))
            told.delete(producer["queue_list"](priority))
        assert celerys["headers"]["origin"]
        assert ours.keys() == celerys.keys()
        assert ours["headers"].keys() - {"idefics_submitted_at"} <= celerys["headers"].keys()
        assert ours["properties"].keys() <= celerys["properties"].keys()
        assert ours["properties"]["priority"] == celerys["properties"]["priority"]
    app.close()


def test_the_producer_cancels_by_key(demo_broker: stack.Broker) -> None:
    producer = runpy.run_path(str(EXAMPLES / "wire" / "producer.py"))
    queue, results = (producer["Redis"](url) for url in (demo_broker.url, demo_broker.results))
    id = str(uuid.uuid4())
    producer["cancel"](results, id)
    job = producer["message"]("idefics.caption", {"image": "https://example.com/cat.png"}, id)
    queue("LPUSH", producer["queue_list"](5), json.dumps(job))
    assert producer["result"](results, id)["status"] == "REVOKED"
