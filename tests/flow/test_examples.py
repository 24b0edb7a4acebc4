"""The examples run as a reader runs them, beside a broker and a worker with the bundled model."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from celery import Celery
from fastapi.testclient import TestClient

from tasks import Client, Complete
from tests.conftest import SITE_SECRET, callback_settings
from tests.support.pictures import data_uri
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack

EXAMPLES = stack.CHECKOUT / "examples"
CAPTION = "A cat on a blue background."


@pytest.fixture
def environment(demo_broker: stack.Broker) -> dict[str, str]:
    """That of a reader whose broker is elsewhere."""
    return {**os.environ, "BROKER_URL": demo_broker.url, "RESULT_BACKEND": demo_broker.results}


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A picture by its first bytes only."""
    (tmp_path / "broken.png").write_bytes((EXAMPLES / "pictures" / "cat.png").read_bytes()[:100])
    return tmp_path / "broken.png"


def lines(program: list[str | Path], environment: dict[str, str], folder: Path) -> list[str]:
    """What a program prints that ends well."""
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
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


def test_two_models_share_a_broker_by_queue(
    environment: dict[str, str], demo_broker: stack.Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("BROKER_URL", "RESULT_BACKEND"):
        monkeypatch.setenv(name, environment[name])
    example = runpy.run_path(str(EXAMPLES / "celery" / "app.py"))
    settings = {"MODEL": "fake", "QUEUE": "idefics.large"}
    with stack.worker(demo_broker, "--hostname", "large@here", settings=settings):
        small, large = [outcome.get(timeout=PATIENCE_S) for outcome in example["compare"]("cat.png")]
        assert small["text"].strip() == CAPTION
        assert (small["model"]["family"], large["model"]["family"]) == ("idefics", "fake")
        job = Client(demo_broker.url, result_backend=demo_broker.results, queue="idefics.large").submit(
            Complete(prompt=["Hello"])
        )
        assert job.result(timeout=PATIENCE_S).model.family == "fake"


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
    message, body = re.findall(r"^```json\n(.*)\n```$", protocol, re.MULTILINE)[:2]
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


# --- examples/fastapi -----------------------------------------------------------------------------


@pytest.fixture
def api(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    for name in ("BROKER_URL", "RESULT_BACKEND"):
        monkeypatch.setenv(name, environment[name])
    with served(monkeypatch) as api:
        yield api


@contextmanager
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """The example, with this process's environment."""
    spec = importlib.util.spec_from_file_location("fastapi_example", EXAMPLES / "fastapi" / "app.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fastapi_example", module)
    spec.loader.exec_module(module)
    with TestClient(module.api, raise_server_exceptions=False) as client:
        yield client


def watched(api: TestClient | httpx2.Client, path: str) -> list[tuple[str, dict[str, Any]]]:
    """A job's events to its end."""
    with api.stream("GET", path) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        told = "".join(stream.iter_text())
    found = re.findall(r"^event: (\w+)\ndata: (.*)\n\n", told, re.MULTILINE)
    return [(name, json.loads(data)) for name, data in found]


def assert_told_as_it_was_written(events: list[tuple[str, dict[str, Any]]]) -> None:
    *told, (last, end) = events
    assert {name for name, _ in told} == {"stage", "text"}
    assert (last, end["status"], end["result"]["text"].strip()) == ("end", "succeeded", CAPTION)
    assert "".join(data["text"] for name, data in told if name == "text") == end["result"]["text"]


def test_a_fastapi_app_submits_polls_and_tells_the_text_while_it_is_written(api: TestClient) -> None:
    sent = api.post("/captions", json={"image": data_uri((EXAMPLES / "pictures" / "cat.png").read_bytes())})
    assert sent.status_code == 202
    assert_told_as_it_was_written(watched(api, f"/captions/{sent.json()['id']}/events"))
    assert api.get(f"/captions/{sent.json()['id']}").json() == {"status": "succeeded", "text": CAPTION}


def test_a_fastapi_app_answers_with_4xx_for_what_its_caller_can_mend(api: TestClient, broken: Path) -> None:
    url = "https://a.example"
    for wrong in ({}, {"image": "cat.png"}, {"image": "ftp://a.example/b"}, {"image": url, "num_beams": 9}):
        assert api.post("/captions", json=wrong).status_code == 422
    sent = api.post("/captions", json={"image": data_uri(broken.read_bytes())})
    name, body = watched(api, f"/captions/{sent.json()['id']}/events")[-1]
    assert (name, body["status"], body["error"]["code"]) == ("end", "failed", "image_invalid")
    read = api.get(f"/captions/{sent.json()['id']}")
    assert (read.status_code, read.json()["error"]) == (422, body["error"])


def test_a_fastapi_app_cancels(api: TestClient) -> None:
    id = str(uuid.uuid4())
    assert api.get(f"/captions/{id}").json() == {"status": "starting", "text": None}
    assert api.delete(f"/captions/{id}").status_code == 204
    eventually(lambda: api.get(f"/captions/{id}").status_code == 409)
    [(name, body)] = watched(api, f"/captions/{id}/events")
    assert (name, body["status"], body["error"]["code"]) == ("end", "canceled", "canceled")


def test_a_fastapi_app_tells_watchers_too_that_redis_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, url in (("BROKER_URL", "redis://127.0.0.1:1/0"), ("RESULT_BACKEND", "redis://127.0.0.1:1/1")):
        monkeypatch.setenv(name, url)
    with served(monkeypatch) as api:
        read = api.get("/captions/a")
        refused = api.get("/captions/a/events")
    assert (refused.status_code, refused.json()) == (503, read.json())
    assert read.json()["error"]["code"] == "broker_unavailable"


# --- examples/django ------------------------------------------------------------------------------


@contextmanager
def site(environment: dict[str, str], port: int, folder: Path) -> Iterator[str]:
    """The Django site's address."""
    environment |= {"DATABASE": str(folder / "db.sqlite3")}
    manage = [sys.executable, str(EXAMPLES / "django" / "manage.py")]
    lines([*manage, "migrate", "--run-syncdb"], environment, folder)
    server = [*manage, "runserver", "--noreload", f"127.0.0.1:{port}"]
    with stack.started(server, log=folder / "site", environment=environment) as process:
        stack.await_line(process, folder / "site", "Quit the server", PATIENCE_S)
        yield f"http://127.0.0.1:{port}"


def ended(address: str, picture: Path) -> dict[str, str]:
    """The row of an upload whose job has ended."""
    sent = httpx2.post(f"{address}/pictures/", files={"picture": (picture.name, picture.read_bytes(), "image/png")})
    assert (sent.status_code, sent.json()["state"]) == (202, "waiting")
    row = f"{address}/pictures/{sent.json()['id']}/"
    eventually(lambda: httpx2.get(row).json()["state"] != "waiting")
    return dict(httpx2.get(row).json())


def test_a_django_site_saves_captions_by_a_link(environment: dict[str, str], broken: Path, tmp_path: Path) -> None:
    celery = [sys.executable, "-m", "celery", "--workdir", str(EXAMPLES / "django"), "-A", "gallery", "worker"]
    celery += ["--hostname", "gallery@%h", "--pool", "solo", "--loglevel", "INFO"]
    with ExitStack() as opened:
        address = opened.enter_context(site(environment, stack.free_port(), tmp_path))
        worker = opened.enter_context(stack.started(celery, log=tmp_path / "log", environment=environment))
        stack.await_line(worker, tmp_path / "log", " ready.", PATIENCE_S)
        row = ended(address, EXAMPLES / "pictures" / "cat.png")
        assert (row["state"], row["text"]) == ("done", CAPTION)
        with httpx2.Client(base_url=address) as site_client:
            assert_told_as_it_was_written(watched(site_client, f"/pictures/{row['id']}/events/"))
        row = ended(address, broken)
        assert row["state"] == "failed"
        assert row["text"].startswith("The ")
        assert httpx2.post(f"{address}/pictures/").status_code == 400
        refused = httpx2.post(f"{address}/pictures/", files={"picture": ("a.png", b"text", "image/png")})
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "image_invalid")


def test_a_django_site_saves_captions_by_a_callback(
    environment: dict[str, str], demo_broker: stack.Broker, callback_port: int, broken: Path, tmp_path: Path
) -> None:
    environment |= {"CALLBACK_URL": f"http://127.0.0.1:{callback_port}/callback/", "CALLBACK_SECRET": SITE_SECRET}
    settings = {f"IDEFICS_{name}": value for name, value in callback_settings(callback_port).items()}
    urls = {"IDEFICS_BROKER_URL": demo_broker.url, "IDEFICS_RESULT_BACKEND": demo_broker.results}
    command = [sys.executable, "-m", "celery", "-A", "worker.callbacks", "worker"]
    with ExitStack() as opened:
        address = opened.enter_context(site(environment, callback_port, tmp_path))
        log = tmp_path / "log"
        worker = opened.enter_context(stack.started(command, log=log, environment=environment | settings | urls))
        stack.await_line(worker, log, " ready.", PATIENCE_S)
        row = ended(address, EXAMPLES / "pictures" / "cat.png")
        assert (row["state"], row["text"]) == ("done", CAPTION)
        row = ended(address, broken)
        assert row["state"] == "failed"
        assert row["text"].startswith("The ")
        assert httpx2.post(f"{address}/callback/", content=b"{}").status_code == 401


# --- examples/node --------------------------------------------------------------------------------


@pytest.mark.skipif(not (shutil.which("node") and shutil.which("npm")), reason="needs node and npm")
def test_a_node_producer_gets_answers_and_a_code(
    environment: dict[str, str], demo_broker: stack.Broker, tmp_path: Path
) -> None:
    for name in ("package.json", "package-lock.json", "index.js"):
        shutil.copy(EXAMPLES / "node" / name, tmp_path)
    install = ["npm", "ci", "--no-audit", "--no-fund"]
    installed = subprocess.run(install, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    if installed.returncode and not os.environ.get("CI"):
        pytest.skip("npm cannot install: no network?")
    assert installed.returncode == 0, installed.stderr
    program: list[str | Path] = ["node", "index.js"]
    assert lines([*program, EXAMPLES / "pictures" / "cat.png"], environment, tmp_path) == [CAPTION, "Blue."]
    (tmp_path / "text.png").write_text("no picture")
    refused = subprocess.run([*program, "text.png"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr.startswith("image_invalid: ")
    assert told_of_a_canceled_job(environment, demo_broker, tmp_path) == [
        "canceled: The job was canceled before its end."
    ]
    told = json.loads(lines(["node", "-e", NODE_FAILURES], environment, tmp_path)[0])
    assert told == [
        ["expired", None, None],
        ["canceled", {"text": "A cat"}, None],
        ["image_unreachable", None, "dns"],
        ["timeout", None, None],
    ]
    away = environment | {"BROKER_URL": "redis://127.0.0.1:1/0"}
    refused = subprocess.run(
        [*program, "text.png"], cwd=tmp_path, env=away, capture_output=True, text=True, timeout=120
    )
    assert refused.returncode == 1
    assert re.search("^broker_unavailable: Redis does not answer .*ECONNREFUSED", refused.stderr, re.MULTILINE)
    assert "node:internal" not in refused.stderr


#: What the example makes of errors as celery-node has them.
NODE_FAILURES = """
const { failure } = require("./index.js");
const errors = [["REVOKED", "TaskRevokedError", ["expired"]],
  ["REVOKED", "TaskRevokedError", ["terminated", { text: "A cat" }]],
  ["FAILURE", "ImageUnreachable", ["image_unreachable", "Try again.", "dns"]], ["TIMEOUT"]];
const told = errors.map(([message, exc_type, exc_message]) => {
  const found = failure(Object.assign(new Error(message), { exc_type, exc_message }));
  return [found.code, found.partial ?? null, found.detail ?? null];
});
console.log(JSON.stringify(told));
"""


def told_of_a_canceled_job(environment: dict[str, str], server: stack.Broker, folder: Path) -> list[str]:
    id = str(uuid.uuid4())
    server.connect(1).set(f"idefics:cancel:{id}", 1, ex=60)
    program = f"""
const {{ client, failure }} = require("./index.js");
client.sendTask("idefics.caption", [], {{ image: "https://example.com/a.png" }}, "{id}").get(30_000)
  .catch(failure).then((error) => console.log(`${{error.code}}: ${{error.message}}`)).then(() => client.disconnect());
"""
    return lines(["node", "-e", program], environment, folder)
