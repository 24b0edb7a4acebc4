"""Two models on one broker, each with a worker and a queue of its own: jobs, keys and batches go to the right one."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tasks import (
    Caption,
    Client,
    Complete,
    Image,
    ImageUnreachable,
    InvalidRequest,
    JobCanceled,
    ModelNotFound,
    ServedModel,
)
from tasks.failed import FailedJobs
from tasks.payloads import ImagePart
from tests.conftest import EXAMPLES
from tests.support.gallery import Gallery
from tests.support.stand import command, stand
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack

CAT = Caption(image=Image.from_file(EXAMPLES / "cat.png"))
HELLO = Complete(prompt=["Hello"], max_new_tokens=3)
DEMO, FAKE = ServedModel("demo", "idefics"), ServedModel("fake:0.02", "idefics.fast")


@dataclass(frozen=True)
class Two:
    """The bundled model on the queue `idefics`, and the fake one on `idefics.fast`."""

    server: stack.Broker
    gallery: Gallery
    fast: subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    log = tmp_path_factory.mktemp("two") / "log"
    with Gallery().open() as gallery, stack.broker() as server:
        small = stack.worker(server, "--hostname", "small@here", settings={"MODEL": "demo", "ANSWER_CACHE_TTL_S": "60"})
        settings = {"QUEUE": FAKE.queue, "MAX_RETRIES": "1", "ANSWER_CACHE_TTL_S": "60"}
        with small, stand(server, gallery, log, "--hostname", "fast@here", **settings) as stood:
            yield Two(server, gallery, stood.process)


@pytest.fixture
def client(two: Two) -> Client:
    client = Client(two.server.url)
    eventually(lambda: client.models() == [DEMO, FAKE])
    return client


def family(job: Any) -> str:
    return str(job.result(PATIENCE_S).model.family)


def test_jobs_are_answered_by_the_model_that_they_name(client: Client) -> None:
    assert family(client.submit(CAT)) == "idefics"
    assert {family(client.submit(HELLO, model=model)) for model in ("fast", FAKE.id)} == {"fake"}
    assert family(client.submit(HELLO, model="demo")) == "idefics"
    fast = Client(app=client.app, model="fast")
    assert (fast.queue, fast.workers(), client.workers()) == (FAKE.queue, ["fast@here"], ["small@here"])
    assert {family(job) for job in fast.submit_many([HELLO] * 3)} == {"fake"}


def test_an_unknown_model_is_refused_with_those_that_are_served(client: Client) -> None:
    with pytest.raises(ModelNotFound, match=r"'large'. Served now: demo, fast \(fake:0\.02\)\.") as refused:
        client.submit(HELLO, model="large")
    assert refused.value.code == "model_not_found"
    assert client.queued() == client.queued(model="fast") == 0


def test_a_key_and_a_kept_answer_do_not_cross(client: Client) -> None:
    keyed = HELLO.model_copy(update={"idempotency_key": uuid.uuid4().hex})
    small, fast = client.submit(keyed), client.submit(keyed, model="fast")
    assert small.id != fast.id
    assert (family(small), family(fast)) == ("idefics", "fake")
    assert (client.submit(keyed).id, client.submit(keyed, model="fast").id) == (small.id, fast.id)
    # The same prompt once more, without the key: each model gives its own answer again.
    again = {model: client.submit(HELLO, model=model).result(PATIENCE_S) for model in ("demo", "fast")}
    assert {model: answer.text for model, answer in again.items()} == {
        "demo": small.result(PATIENCE_S).text,
        "fast": fast.result(PATIENCE_S).text,
    }
    assert again["demo"].text != again["fast"].text


def test_a_batch_has_lines_for_both_models(two: Two, client: Client, tmp_path: Path) -> None:
    def openais(id: str, model: str) -> dict[str, Any]:
        body = {"model": model, "max_tokens": 3, "messages": [{"role": "user", "content": "Hello"}]}
        return {"custom_id": id, "method": "POST", "url": "/v1/chat/completions", "body": body}

    ours = {"task": "complete", "arguments": {"prompt": ["Hello"], "max_new_tokens": 3}}
    lines = [openais(f"{model}-{number}", model) for model in ("demo", "fast") for number in range(20)]
    lines += [openais("other", "gpt-4o"), {"custom_id": "ours", "model": "fast", **ours}]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with pytest.raises(AssertionError, match="42 lines done, 1 of them failed"):
        command(two.server, "tasks", "batch", str(source), str(output))
    answers = {answer["custom_id"]: answer for answer in map(json.loads, output.read_text().splitlines())}
    assert answers.keys() == {line["custom_id"] for line in lines}
    assert answers.pop("ours")["result"]["model"]["family"] == "fake"
    refused = answers.pop("other")["response"]
    assert (refused["status_code"], refused["body"]["error"]["code"]) == (404, "model_not_found")
    models = {(id.split("-")[0], answer["response"]["body"]["model"]) for id, answer in answers.items()}
    assert models == {("demo", "demo"), ("fast", "fake")}
    # And with a model chosen, all lines go to it.
    command(two.server, "tasks", "--model", "fast", "batch", str(source), str(tmp_path / "fast.jsonl"))
    assert ['"fake"' in answer for answer in (tmp_path / "fast.jsonl").read_text().splitlines()] == [True] * len(lines)


def test_a_retried_job_and_a_failed_one_that_is_sent_again_stay_with_their_model(two: Two, client: Client) -> None:
    name = uuid.uuid4().hex
    url = two.gallery.broken(name, times=2)
    job = client.submit(Complete(prompt=[ImagePart(image=url), "Hello"], max_new_tokens=3), model="fast")
    with pytest.raises(ImageUnreachable):
        job.result(PATIENCE_S)
    assert two.gallery.asked.count(name) == 2, "the bundled model's worker may not read the gallery"
    eventually(lambda: [kept.id for kept in client.failed()] == [job.id])
    assert FailedJobs(client.app).signature(job.id)["options"]["queue"] == FAKE.queue
    # From a client of the other queue.
    assert client.retry(job.id).result(PATIENCE_S).model.family == "fake"


def test_a_canceled_job_and_priorities_go_by_the_queue(two: Two, client: Client) -> None:
    slow = client.submit(Complete(prompt=["Hello"], max_new_tokens=500), model="fast")
    eventually(lambda: slow.status == "processing")
    slow.cancel()
    with pytest.raises(JobCanceled):
        slow.result(PATIENCE_S)
    later = client.submit(HELLO, model="fast", countdown=600)
    eventually(lambda: two.server.connect().exists(f"idefics:due:{FAKE.queue}\x06\x165"))
    later.cancel()
    eventually(lambda: later.status == "canceled")
    assert family(client.submit(HELLO, model="fast", priority=0)) == "fake"


def test_the_command_shows_both_models(two: Two, client: Client) -> None:
    assert command(two.server, "tasks", "models") == "-\tdemo\tidefics\nfast\tfake:0.02\tidefics.fast\n"
    shown = json.loads(command(two.server, "tasks", "--model", "fast", "queue", "--json"))
    assert (shown["queue"], shown["workers"], shown["models"]) == (FAKE.queue, ["fast@here"], [FAKE.id])
    id = command(two.server, "tasks", "--model", "fast", "submit", "complete", "prompt=Hello").strip()
    assert family(client.job(id)) == "fake"


def test_a_model_whose_worker_has_ended_keeps_its_jobs_until_it_is_back(two: Two, client: Client) -> None:
    """The last test: it ends one of the workers."""
    two.fast.terminate()
    two.fast.wait(PATIENCE_S)
    waits = client.submit(HELLO, model="fast")
    refused = Complete(prompt=["Hello"], max_new_tokens=5_000)
    with pytest.raises(InvalidRequest):
        client.submit(refused).result(PATIENCE_S)
    assert (waits.status, client.queued(model="fast")) == ("starting", 1)
    with stack.worker(two.server, "--hostname", "back@here", settings={"MODEL": "fake", "QUEUE": FAKE.queue}):
        assert family(waits) == "fake"
