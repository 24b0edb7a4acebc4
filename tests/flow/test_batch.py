"""`idefics-jobs batch` on a real broker and worker: killed, stopped, gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks import Client, Complete
from tasks.redis_keys import RESULTS_FINGERPRINT
from tests.support.stand import Producer
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack

LINES = 1_000


@pytest.fixture(scope="module")
def worker() -> Iterator[tuple[stack.Broker, subprocess.Popen[bytes]]]:
    with stack.broker() as server, stack.worker(server, settings={"MODEL": "fake"}) as process:
        yield server, process


@pytest.fixture
def server(worker: tuple[stack.Broker, subprocess.Popen[bytes]]) -> stack.Broker:
    return worker[0]


def line(number: int) -> str:
    arguments = {"prompt": [f"Hello {number:04}"], "max_new_tokens": 4}
    return json.dumps({"custom_id": f"r{number}", "task": "complete", "arguments": arguments})


def started(server: stack.Broker, *arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "IDEFICS_BROKER_URL": server.url, "IDEFICS_RESULT_BACKEND": server.results}
    command = [sys.executable, "-m", "tasks", "batch", *map(str, arguments)]
    return subprocess.Popen(command, cwd=stack.CHECKOUT, env=environment, text=True, stderr=subprocess.PIPE, **options)


def written(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def texts(path: Path) -> dict[str, str]:
    """By custom_id, each of which stands there once."""
    answers = [json.loads(answer) for answer in written(path)]
    assert max(Counter(answer["custom_id"] for answer in answers).values()) == 1
    return {answer["custom_id"]: answer["result"]["text"] for answer in answers}


def runs(server: stack.Broker) -> int:
    """Jobs that the worker has taken so far."""
    return int(Producer(server).stats()["total"].get("idefics.complete", 0))


def test_a_killed_batch_goes_on_and_has_every_line_once(server: stack.Broker, tmp_path: Path) -> None:
    input, output, before = tmp_path / "in.jsonl", tmp_path / "out.jsonl", runs(server)
    input.write_text("".join(f"{line(number)}\n" for number in range(LINES)))
    kills = 0
    for share in (0.1, 0.3):
        batch = started(server, input, output, "--window", "300")
        eventually(lambda share=share: len(written(output)) > share * LINES)
        batch.kill()
        batch.wait(PATIENCE_S)
        kills += 1
    with output.open("a") as half:
        half.write('{"custom_id": "r19')
    assert len(written(output)) < LINES

    batch = started(server, input, output, "--window", "300")
    _, said = batch.communicate(timeout=120)
    assert (batch.returncode, said.splitlines()[-1]) == (0, f"{LINES:,} lines done, 0 of them failed.")
    assert texts(output) == {f"r{number}": f"{number:04}" for number in range(LINES)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    # A kill may come between sending a job and noting it, or between writing a turn's answers and forgetting them.
    assert LINES <= runs(server) - before <= LINES + kills
    assert server.connect(1).dbsize() <= kills * 300
    server.connect(1).flushdb()


def test_a_batch_whose_worker_stands_still_is_stopped_and_goes_on(
    worker: tuple[stack.Broker, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    server, process = worker
    input, output, before = tmp_path / "in.jsonl", tmp_path / "out.jsonl", runs(server)
    input.write_text("".join(f"{line(number)}\n" for number in range(200)))
    parent = psutil.Process(process.pid)
    asleep = [parent, *parent.children(recursive=True)]
    for part in asleep:
        part.suspend()
    try:
        batch = started(server, input, output, "--window", "100")
        note = tmp_path / "out.jsonl.resume"
        eventually(lambda: note.exists() and int(note.read_text().split()[1]) == 100)
        batch.send_signal(signal.SIGINT)
        _, said = batch.communicate(timeout=PATIENCE_S)
        assert batch.returncode == 130
        assert said.startswith("Stopped: 0 lines done, 0 of them failed. Jobs in flight go on. Run the same command")
        batch = started(server, input, output, "--window", "100")
        time.sleep(1)
    finally:
        for part in asleep:
            part.resume()
    batch.communicate(timeout=PATIENCE_S)
    assert batch.returncode == 0
    assert texts(output) == {f"r{number}": f"{number:04}" for number in range(200)}
    assert runs(server) - before == 200
    assert set(server.connect(1).keys()) <= {RESULTS_FINGERPRINT.named().encode()}


def test_bad_lines_fail_alone_and_openais_lines_are_answered_in_openais_form(
    server: stack.Broker, tmp_path: Path
) -> None:
    chat = {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions"}
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello"}], "max_completion_tokens": 5}
    unread = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/cat.png"}}
    blocked = {**body, "messages": [{"role": "user", "content": [unread]}]}
    lines = [line(1), "{", line(1), json.dumps({**chat, "body": body})]
    lines += [json.dumps({**chat, "custom_id": "blocked", "body": blocked})]
    batch = started(server, "-", "-", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    said, told = batch.communicate("\n".join(lines), timeout=PATIENCE_S)
    assert (batch.returncode, told.splitlines()[-1]) == (1, "5 lines done, 3 of them failed.")
    answers = {answer.get("line", answer["custom_id"]): answer for answer in map(json.loads, said.splitlines())}
    assert answers["r1"]["result"]["text"] == "0001"
    assert (answers[2]["custom_id"], answers[2]["error"]["code"]) == (None, "invalid_request")
    assert (answers[3]["custom_id"], answers[3]["error"]["code"]) == ("r1", "invalid_request")

    assert answers["chat"].keys() == {"id", "custom_id", "response", "error"}
    completion = answers["chat"]["response"]["body"]
    assert (answers["chat"]["response"]["status_code"], completion["object"]) == (200, "chat.completion")
    assert completion["choices"][0]["finish_reason"] == "length"
    assert len(completion["choices"][0]["message"]["content"]) == completion["usage"]["completion_tokens"] == 5
    refused = answers["blocked"]
    assert (refused["error"], refused["response"]["status_code"]) == (None, 400)
    assert refused["response"]["body"]["error"]["code"] == "image_blocked"


def test_a_producer_does_not_subscribe_to_results_that_it_asks_for(server: stack.Broker) -> None:
    client = Client(server.url)
    jobs = client.submit_many(Complete(prompt=["Hello"], max_new_tokens=3) for _ in range(10))
    assert server.connect(1).pubsub_channels("celery-task-meta-*") == []
    # Celery's own way still works on them.
    assert [job.async_result.get(timeout=PATIENCE_S)["text"] for job in jobs] == ["llo"] * 10
    assert client.outcomes(job.id for job in jobs).keys() == {job.id for job in jobs}
    client.forget(job.id for job in jobs)
    assert client.outcomes(job.id for job in jobs) == {}
