"""Which model a batch's lines go to, with the fake client."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tasks import Job, ModelNotFound, batch, job_window
from tasks.batch import Batch
from tasks.batch_models import MAX_REMEMBERED
from tasks.testing import FakeClient


def ours(id: str, model: Any = None) -> str:
    line = {"custom_id": id, "task": "complete", "arguments": {"prompt": ["Hello"]}}
    return json.dumps(line if model is None else {**line, "model": model})


def openais(id: str, model: Any = "gpt-4o") -> str:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
    return json.dumps({"custom_id": id, "method": "POST", "url": "/v1/chat/completions", "body": body})


def answered_by(answers: list[dict[str, Any]]) -> dict[str, str]:
    """Each line's model, or the code that it was refused with."""
    found = {}
    for answer in answers:
        if response := answer.get("response"):
            body = response["body"]
            found[answer["custom_id"]] = body["model"] if response["status_code"] == 200 else body["error"]["code"]
        else:
            found[answer["custom_id"]] = (
                answer["result"]["model"]["id"] if "result" in answer else answer["error"]["code"]
            )
    return found


def run(client: FakeClient, *lines: str) -> dict[str, str]:
    return answered_by(list(batch.run(client, lines)))


def test_each_line_is_answered_by_the_model_that_it_names() -> None:
    lines = [ours("a", "large"), ours("b"), openais("c", "small"), openais("d", "fake"), ours("e", "fake")]
    found = run(FakeClient(models=["large", "small"]), *lines)
    assert found == {"a": "large", "b": "fake", "c": "small", "d": "fake", "e": "fake"}


def test_with_one_model_openais_lines_are_answered_whatever_they_name_and_the_user_is_told_once() -> None:
    notes: list[str] = []
    lines = [openais("a"), openais("b"), openais("c", "HuggingFaceM4/idefics-9b"), openais("d", 7), openais("e", None)]
    answers = [answer for turn in Batch(FakeClient(), lines, on_note=notes.append).turns() for answer in turn]
    assert answered_by(answers) == dict.fromkeys("abcde", "fake")
    assert [note.partition(": ")[0] for note in notes] == [
        "No worker serves the model 'gpt-4o'",
        "No worker serves the model 'HuggingFaceM4/idefics-9b'",
    ]


def test_with_several_models_an_unknown_one_fails_its_line_alone() -> None:
    client = FakeClient(models=["large"])
    answers = list(batch.run(client, [openais("a"), openais("b", "large"), ours("c", "smal")]))
    assert answered_by(answers) == {"a": "model_not_found", "b": "large", "c": "model_not_found"}
    (refused,) = [answer for answer in answers if answer["custom_id"] == "a"]
    assert (refused["response"]["status_code"], refused["error"]) == (404, None)
    assert refused["response"]["body"]["error"]["type"] == "invalid_request_error"
    assert "Served now: fake, large." in refused["response"]["body"]["error"]["message"]
    assert len(client.submitted) == 1


def test_a_line_of_ours_that_names_an_unknown_model_is_refused_even_with_one_model() -> None:
    assert run(FakeClient(), ours("a", "large"), ours("b")) == {"a": "model_not_found", "b": "fake"}


def test_a_line_of_ours_whose_model_is_no_text_is_refused() -> None:
    assert run(FakeClient(), ours("a", 7)) == {"a": "invalid_request"}


def test_a_client_that_was_made_for_a_queue_or_a_model_answers_all_lines() -> None:
    client = FakeClient(models=["large"])
    client.is_bound = True
    assert run(client, ours("a", "large"), openais("b"), ours("c", "smal")) == dict.fromkeys("abc", "fake")


def test_a_client_whose_own_model_is_gone_ends_the_batch() -> None:
    class OfModel(FakeClient):
        is_bound = True

        def submit(self, job: Job, **options: Any) -> Any:
            raise ModelNotFound("large")

    with pytest.raises(ModelNotFound):
        run(OfModel(), ours("a"))


def test_a_client_of_ones_own_that_knows_no_models_is_sent_all_lines() -> None:
    class Own:
        def __init__(self) -> None:
            self._fake = FakeClient()
            self.submit_options: list[set[str]] = []

        def submit(self, job: Job, *, priority: int, task_id: str) -> Any:
            return self._fake.submit(job, priority=priority, task_id=task_id)

        def outcomes(self, ids: Any) -> Any:
            return self._fake.outcomes(ids)

        def forget(self, ids: Any) -> None:
            self._fake.forget(ids)

    assert answered_by(list(batch.run(Own(), [openais("a")]))) == {"a": "fake"}


def test_names_without_end_are_not_all_remembered() -> None:
    notes: list[str] = []
    lines = (openais(str(number), f"model-{number}") for number in range(MAX_REMEMBERED + 20))
    answers = [answer for turn in Batch(FakeClient(), lines, on_note=notes.append).turns() for answer in turn]
    assert len(answers) == MAX_REMEMBERED + 20
    assert len(notes) == MAX_REMEMBERED


def test_a_line_with_another_model_is_another_job() -> None:
    client = FakeClient(models=["large"])
    for model in ("large", "fake"):
        list(Batch(client, [ours("a", model)], name="n").turns())
    assert len(client.submitted) == 2


def test_jobs_that_wait_in_another_models_queue_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    class Waiting(FakeClient):
        def outcomes(self, ids: Any) -> Any:
            return {}

        def job(self, id: str) -> Any:
            return type("Job", (), {"status": "starting"})

        def queued(self, priority: int | None = None, *, model: str | None = None) -> int:
            super().queued(priority, model=model)
            return int(model == "large")

    monkeypatch.setattr(job_window, "LOST_S", 0.0)
    monkeypatch.setattr(job_window, "RESUMED_LOST_S", 0.0)
    turns = Batch(Waiting(models=["large"]), [openais("a", "large"), openais("b", "fake")]).turns()
    assert [next(turns) for _ in range(4)] == [[]] * 4
    # That of an earlier run went to the client's own queue.
    with pytest.raises(batch.JobsLost):
        list(Batch(Waiting(models=["large"]), [openais("a")], sent=1).turns())
