"""`idefics-jobs verify` on a real worker with the bundled model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from click.testing import Result as Outcome

from tasks import Answer, Client, ImagePath, Job, TextUpdate
from tasks.cli import main
from tasks.response_format import RegexFormat
from tests.conftest import PICTURES
from tests.support.waiting import PATIENCE_S
from worker.demo.stack import Broker

FIRST, SECOND = (ImagePath(path=path.name) for path in sorted(PICTURES.glob("1-*.png"))[:2])
JOB = Answer(image=FIRST, question="What is this?", max_new_tokens=8)


@pytest.fixture
def demo_client(demo_broker: Broker) -> Client:
    return Client(demo_broker.url)


@pytest.fixture
def verify(demo_broker: Broker, tmp_path: Path) -> Callable[..., Outcome]:
    def run(result: str, job: Job, *options: str) -> Outcome:
        file = tmp_path / "job.json"
        file.write_text(json.dumps({"task": job.task, "arguments": job.arguments()}))
        words = ["--broker", demo_broker.url, "verify", result, "--job", str(file), "--timeout", str(PATIENCE_S)]
        return CliRunner().invoke(main, [*words, *options])

    return run


def test_an_answer_in_company_is_the_one_that_its_job_gets_alone(
    demo_client: Client, verify: Callable[..., Outcome]
) -> None:
    sampled = JOB.model_copy(update={"temperature": 1.5, "callback": None, "idempotency_key": "verified"})
    jobs = demo_client.submit_many([sampled, *(JOB.model_copy(update={"max_new_tokens": n}) for n in range(1, 9))])
    results = [job.result(PATIENCE_S) for job in jobs]
    assert all(result.receipt and result.receipt.weights for result in results)
    for number, job in ((0, sampled), (8, JOB)):
        said = verify(jobs[number].id, job)
        assert (said.stdout, said.exit_code) == ("identical\n", 0), said.output


def test_several_answers_in_a_form_are_watched_and_verified(
    demo_client: Client, verify: Callable[..., Outcome], tmp_path: Path
) -> None:
    regex = "[a-z]{2,6}( [a-z]{2,6}){2}"
    form = RegexFormat(type="regex", regex=regex)
    asked = {"response_format": form, "max_new_tokens": 24, "n": 3, "temperature": 2.0, "stream": True}
    job = JOB.model_copy(update=asked)
    sent = demo_client.submit(job)
    updates = list(sent.watch(PATIENCE_S))
    result = sent.result(PATIENCE_S)
    assert "".join(update.text for update in updates if isinstance(update, TextUpdate)) == result.text
    assert result.choices
    assert result.choices[0].text == result.text
    assert all(re.fullmatch(regex, choice.text) for choice in result.choices if choice.finish_reason == "stop")
    said = verify(sent.id, job)
    assert (said.stdout, said.exit_code) == ("identical\n", 0), said.output
    other = result.choices[2].model_copy(update={"text": "another"})
    file = tmp_path / "result.json"
    file.write_text(result.model_copy(update={"choices": [*result.choices[:2], other]}).model_dump_json())
    assert json.loads(verify(str(file), job, "--json").stdout)["answer"] == "choices"


@pytest.mark.parametrize(
    ("changed", "causes"),
    [({"image": SECOND}, ["pixels"]), ({"question": "How many are there?"}, ["prompt"]),
     ({"max_new_tokens": 1}, ["sampling"])],
)  # fmt: skip
def test_what_differs_is_said(
    demo_client: Client, verify: Callable[..., Outcome], changed: dict[str, Any], causes: list[str], tmp_path: Path
) -> None:
    result = demo_client.submit(JOB).result(PATIENCE_S)
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"custom_id": "a", "result": result.model_dump(mode="json")}))
    said = verify(str(file), JOB.model_copy(update=changed), "--json")
    told = json.loads(said.stdout)
    assert (told["identical"], told["causes"], said.exit_code) == (False, causes, 1)
    assert told["first"]["weights"] == told["again"]["weights"]
    if "sampling" in causes:
        assert told["answer"] == "token 2"


def test_results_and_jobs_that_cannot_be_compared_are_refused(verify: Callable[..., Outcome], tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_text("[]")
    assert "is not a result" in verify(str(file), JOB).stderr
