"""`idefics-jobs` in a shell, with the fake client behind it."""

from __future__ import annotations

import base64
import json
import threading
import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from click.testing import Result as Outcome
from kombu.exceptions import OperationalError
from redis.exceptions import ConnectionError as RedisConnectionError

from tasks import (
    Answer,
    Caption,
    Chat,
    Classify,
    Complete,
    ImageBlocked,
    InvalidRequest,
    Job,
    JobCanceled,
    JobTimeout,
    ModelNotFound,
    Result,
    Write,
)
from tasks.cli import connection, main, waiting
from tasks.cli.fields import arguments, data_uri
from tasks.testing import FakeClient, FakeJob, canned
from tasks.worker_registry import no_worker

URL = "https://example.com/a.jpg"
AWAY = (
    "Error: Redis does not answer (away): is it up, and its URL right? Name another with --broker or "
    "IDEFICS_BROKER_URL.\n"
)


class Recorder(FakeClient):
    """Remembers the options of submission too."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.options: list[dict[str, Any]] = []

    def submit(self, job: Job, **options: Any) -> Any:
        self.options.append(options)
        return super().submit(job, **options)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    client = Recorder(lambda job: "the Eiffel Tower")
    monkeypatch.setattr(connection, "Client", lambda *args, **options: client)
    return client


def run(*args: str) -> Outcome:
    return CliRunner().invoke(main, args)


# Fields


def test_a_field_is_a_name_and_a_value() -> None:
    fields = ("image=https://example.com/a.jpg?b=c", "question=Is 1=1?")
    assert arguments(Answer, fields) == {"image": "https://example.com/a.jpg?b=c", "question": "Is 1=1?"}


def test_a_list_takes_its_name_several_times() -> None:
    assert arguments(Classify, ("labels=food", "labels=animal"))["labels"] == ["food", "animal"]
    assert arguments(Write, (f"images={URL}",))["images"] == [URL]
    assert arguments(Complete, (f"prompt={URL}", "prompt=A photo of"))["prompt"] == [URL, "A photo of"]
    assert arguments(Caption, ("stop=a", "stop=b"))["stop"] == ["a", "b"]


def test_a_field_with_a_colon_is_json() -> None:
    fields = ("num_beams:=4", 'metadata:={"row": 7}', 'labels:=["food", "animal"]', "prompt:=null")
    assert arguments(Classify, fields) == {
        "num_beams": 4,
        "metadata": {"row": 7},
        "labels": ["food", "animal"],
        "prompt": None,
    }


def test_lists_of_objects_are_built_up_as_json() -> None:
    fields = ('messages:={"role": "user", "content": "Hello"}', 'messages:={"role": "user", "content": "Bye"}')
    assert [message["content"] for message in arguments(Chat, fields)["messages"]] == ["Hello", "Bye"]


JPEG = b"\xff\xd8\xff\xe0picture"


def test_a_file_becomes_a_data_uri(tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(JPEG)
    expected = f"data:image/jpeg;base64,{base64.b64encode(JPEG).decode()}"
    assert arguments(Caption, (f"image=@{tmp_path}/cat.jpg",)) == {"image": expected}
    assert arguments(Write, (f"images=@{tmp_path}/cat.jpg", f"images={URL}")) == {"images": [expected, URL]}


def test_a_file_is_what_its_first_bytes_say(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(JPEG)
    assert data_uri(tmp_path / "cat.png").startswith("data:image/jpeg;base64,")


def test_a_file_that_is_no_picture_is_refused_before_it_is_sent(client: Recorder, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"<html>")
    outcome = run("submit", "caption", f"image=@{tmp_path}/cat.png")
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert outcome.stderr.startswith("image_invalid: ")
    assert client.submitted == []


@pytest.mark.parametrize(
    ("task", "field"), [("caption", "image"), ("write", "images"), ("complete", "prompt"), ("answer", "question")]
)
def test_a_file_without_its_mark_is_told_how_it_is_sent(
    task: str, field: str, client: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat.png").write_bytes(JPEG)
    outcome = run("submit", task, f"{field}=cat.png")
    assert outcome.exit_code == 2
    assert f"write {field}=@cat.png" in outcome.stderr
    assert client.submitted == []


def test_a_text_that_is_also_a_files_name_stays_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "food").write_text("a list")
    assert arguments(Classify, ("labels=food",)) == {"labels": ["food"]}
    assert arguments(Classify, (f"labels={'a' * 5000}",)) == {"labels": ["a" * 5000]}


@pytest.mark.parametrize(
    ("field", "message"),
    [("image", "name=value"), ("metadata:={", "metadata is not JSON"), ("image=@/nowhere/cat.jpg", "Cannot read")],
)
def test_a_field_that_cannot_be_read_is_explained(field: str, message: str) -> None:
    with pytest.raises(click.UsageError, match=message):
        arguments(Caption, (field,))


# submit


def test_submit_prints_the_jobs_id(client: Recorder) -> None:
    outcome = run("submit", "caption", f"image={URL}", "num_beams=2", "--priority", "1")
    assert outcome.exit_code == 0
    assert client.submitted == [Caption(image=URL, num_beams=2)]
    assert client.options == [{"priority": 1}]
    assert client.job(outcome.stdout.strip()).status == "succeeded"


def test_submit_prints_json_on_one_line(client: Recorder) -> None:
    (line,) = run("submit", "caption", f"image={URL}", "--json").stdout.splitlines()
    id = json.loads(line)["id"]
    assert client.job(id).status == "succeeded"
    for command in (["submit", "caption", f"image={URL}", "--wait", "--json"], ["result", id, "--json"]):
        (line,) = run(*command).stdout.splitlines()
        assert json.loads(line)["text"] == "the Eiffel Tower"


def test_submit_has_the_default_priority(client: Recorder) -> None:
    run("submit", "caption", f"image={URL}")
    assert client.options == [{"priority": 5}]


def test_submit_and_wait_prints_the_result_as_json(client: Recorder) -> None:
    outcome = run("submit", "caption", f"image={URL}", "--wait", "--timeout", "5")
    assert outcome.exit_code == 0
    assert Result.model_validate_json(outcome.stdout).text == "the Eiffel Tower"


@pytest.mark.parametrize("task", ["caption", "answer", "classify", "write", "complete", "chat"])
def test_every_task_can_be_submitted(task: str) -> None:
    assert f"[{task}]" not in run("submit", task).output
    assert run("submit", task).exit_code == 1, "a payload without its fields is refused, not the task"


def test_a_refused_payload_is_told_with_its_code_on_standard_error(client: Recorder) -> None:
    outcome = run("submit", "caption", f"image={URL}", "colour=red")
    assert outcome.exit_code == 1
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("invalid_request: ")
    assert "colour" in outcome.stderr
    assert client.submitted == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InvalidRequest("The job has too many bytes."), "invalid_request: The job has too many bytes.\n"),
        (RedisConnectionError("away"), AWAY),
        (OperationalError("away"), AWAY),
    ],
)
def test_a_job_that_cannot_be_sent_is_told_without_a_traceback(
    client: Recorder, error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(job: Job, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(client, "submit", refuse)
    outcome = run("submit", "caption", f"image={URL}")
    assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (1, "", said)


def test_a_blocked_image_is_told_with_its_code(client: Recorder) -> None:
    outcome = run("submit", "caption", "image=file:///etc/passwd")
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert outcome.stderr.startswith("image_blocked: ")


def test_a_failed_job_is_told_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def blocked(job: Job) -> str:
        raise ImageBlocked("Use another.")

    monkeypatch.setattr(connection, "Client", lambda *args, **options: FakeClient(blocked))
    outcome = run("submit", "caption", f"image={URL}", "--wait")
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert outcome.stderr == "image_blocked: Use another.\n"


@pytest.mark.parametrize("priority", ["-1", "10", "high"])
def test_a_priority_out_of_bounds_is_a_usage_error(client: Recorder, priority: str) -> None:
    assert run("submit", "caption", f"image={URL}", "--priority", priority).exit_code == 2
    assert client.submitted == []


def test_an_unknown_task_is_a_usage_error_that_lists_the_tasks(client: Recorder) -> None:
    outcome = run("submit", "captoin", f"image={URL}")
    assert outcome.exit_code == 2
    assert "caption" in outcome.stderr


def test_a_broker_that_does_not_say_where_results_are_is_told_without_a_traceback() -> None:
    outcome = run("--broker", "memory://", "submit", "caption", f"image={URL}")
    assert outcome.exit_code in (1, 2)
    assert isinstance(outcome.exception, SystemExit)
    assert "result" in outcome.stderr


class Idle(Recorder):
    """A client whose jobs nobody takes."""

    def __init__(self) -> None:
        super().__init__()
        self.has_told = threading.Event()

    def job(self, id: str) -> Any:
        return self

    def submit(self, job: Job, **options: Any) -> Any:
        return self

    def result(self, *_: Any) -> Result:
        assert self.has_told.wait(10)
        raise JobTimeout("No answer.")

    def queued(self, priority: int | None = None) -> int:
        return 3

    def workers(self) -> list[str]:
        threading.Timer(0.2, self.has_told.set).start()
        return []


@pytest.mark.parametrize("command", [["submit", "caption", f"image={URL}", "--wait"], ["result", "row-7"]])
def test_a_wait_without_workers_says_so_once(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "Client", lambda *args, **options: Idle())
    monkeypatch.setattr(waiting, "CHECK_INTERVAL_S", 0.01)
    told = f"3 jobs wait. {no_worker('idefics')}\n"
    assert run(*command).stderr == f"{told}timeout: No answer.\n"


def test_a_wait_with_a_worker_is_silent(client: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "CHECK_INTERVAL_S", 0.01)
    monkeypatch.setattr(FakeJob, "result", lambda *_: time.sleep(0.1) or canned("a cat", Caption(image=URL)))
    assert run("submit", "caption", f"image={URL}", "--wait").stderr == ""


# result


def test_result_prints_a_submitted_jobs_result(client: Recorder) -> None:
    job = client.submit(Caption(image=URL, metadata={"row": 7}))
    outcome = run("result", job.id)
    assert outcome.exit_code == 0
    assert json.loads(outcome.stdout)["metadata"] == {"row": 7}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (TimeoutError("No answer after 1 s."), "No answer after 1 s.\n"),
        (JobCanceled("It was canceled."), "canceled"),
        (RedisConnectionError("away"), "Redis does not answer (away)"),
    ],
)
def test_a_job_without_a_result_exits_with_one(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Waiting:
        def result(self, timeout: float | None = None) -> Result:
            raise error

    class Pending(FakeClient):
        def job(self, id: str) -> Any:
            return Waiting()

    monkeypatch.setattr(connection, "Client", lambda *args, **options: Pending())
    outcome = run("result", "row-7", "--timeout", "1")
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert message in outcome.stderr


def test_the_urls_and_the_queue_or_the_model_reach_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def remember(*args: Any, **options: Any) -> FakeClient:
        seen.append((args, options))
        return FakeClient()

    monkeypatch.setattr(connection, "Client", remember)
    run("--broker", "redis://a/0", "--results", "redis://b/0", "submit", "caption", f"image={URL}")
    run("--queue", "idefics.large", "submit", "caption", f"image={URL}")
    monkeypatch.setenv("IDEFICS_QUEUE", "idefics.small")
    run("submit", "caption", f"image={URL}")
    run("--model", "large", "submit", "caption", f"image={URL}")
    assert seen == [
        (("redis://a/0",), {"result_backend": "redis://b/0", "queue": None, "model": None}),
        ((None,), {"result_backend": None, "queue": "idefics.large", "model": None}),
        ((None,), {"result_backend": None, "queue": "idefics.small", "model": None}),
        ((None,), {"result_backend": None, "queue": None, "model": "large"}),
    ]


def test_a_queue_and_a_model_are_a_usage_error(client: Recorder) -> None:
    outcome = run("--queue", "idefics.large", "--model", "large", "submit", "caption", f"image={URL}")
    assert (outcome.exit_code, client.submitted) == (2, [])


def test_a_model_that_no_worker_serves_ends_the_command_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class OfModel(FakeClient):
        @property
        def queue(self) -> str:
            raise ModelNotFound("large", self.models())

    monkeypatch.setattr(connection, "Client", lambda *args, **options: OfModel(models=["small"]))
    outcome = run("--model", "large", "queue")
    assert outcome.exit_code == 1
    assert "model_not_found: No worker serves the model 'large'. Served now: fake, small." in outcome.stderr


def test_models_are_shown_by_name_id_and_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "Client", lambda *args, **options: FakeClient(models=["small"]))
    assert run("models").stdout == "-\tfake\tidefics\nsmall\tsmall\tidefics.small\n"
    assert [json.loads(line) for line in run("models", "--json").stdout.splitlines()] == [
        {"name": None, "id": "fake", "queue": "idefics"},
        {"name": "small", "id": "small", "queue": "idefics.small"},
    ]
