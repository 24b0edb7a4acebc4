"""The receipts of results: what an answer depended on, and nothing secret."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tasks.results import ModelInfo, Receipt, Result
from tests.support.pictures import data_uri, png
from tests.unit.service.jobs import CONTEXT, Start, complete, job
from worker.engine.interfaces import Admit, PromptContent, SendHeartbeat
from worker.engine.row import Output, Picture, Row, Sampling, Tokens
from worker.jobs.receipts import Receipts
from worker.jobs.runs import JobContext
from worker.jobs.service import Service
from worker.models.fake import FakeCodec, FakeModel

INFO = ModelInfo(id="HuggingFaceM4/idefics-9b", revision="a" * 40, family="idefics", dtype="bfloat16")
OUTPUT = Output((1, 2), "length")
PICTURES = tuple(Picture(bytes([n]) * 16, None) for n in range(12))


def receipt_of(result: Result) -> Receipt:
    assert result.receipt is not None
    return result.receipt


def write(row: Row, output: Output = OUTPUT, info: ModelInfo = INFO, **context: Any) -> Receipt:
    receipts = Receipts(info, lambda row: "continuous", lambda: "f" * 16)
    return receipts.receipt(row.tokens, row, output, JobContext(id="job", **context))


def shown(*pictures: Picture, **sampling: Any) -> Row:
    return Row(Tokens((1, 2, 3), pictures), Sampling(**{"max_new_tokens": 4, **sampling}))


def test_every_result_has_a_receipt(service: Service) -> None:
    result = service.run(complete("the red door", max_new_tokens=4), JobContext("job", retries=1, worker="idefics@a"))
    receipt = receipt_of(result)
    assert (receipt.model, receipt.dtype, receipt.attempts, receipt.worker) == ("fake", "float32", 2, "idefics@a")
    assert receipt.sampling == {"max_new_tokens": 4}
    told = json.loads(result.model_dump_json())["receipt"]
    assert "seed" not in told
    assert "pixels" not in told
    assert "cached" not in told
    assert "token_ends" not in told
    assert Result.model_validate(result.model_dump(mode="json")) == result


def test_what_changes_the_prompt_changes_its_hash(service: Service) -> None:
    def prompt(text: str) -> str:
        return receipt_of(service.run(complete(text), CONTEXT)).prompt

    assert prompt("a") == prompt("a") != prompt("b")
    labels = [Row(Tokens((1,)), Sampling(1), labels) for labels in (((1,), (2,)), ((1, 2),), ((2,), (1,)))]
    assert len({write(row).prompt for row in labels}) == 3


def test_pictures_have_a_hash_each_and_many_have_one() -> None:
    assert write(shown(*PICTURES[:3])).pixels == [f"{n:02x}" * 8 for n in range(3)]
    (one,) = write(shown(*PICTURES)).pixels
    assert [one] != write(shown(*PICTURES[:11])).pixels != write(shown(*reversed(PICTURES))).pixels


def test_a_sampled_job_without_a_seed_gets_one_that_repeats_its_answer(start: Start) -> None:
    seeds: list[int | None] = []

    class Chance(FakeModel):
        def run(self, rows: Sequence[Row], heartbeat: SendHeartbeat, admit: Admit) -> None:
            seeds.extend(row.sampling.seed for row in rows)
            super().run(rows, heartbeat, admit)

    service = start(Chance())
    drawn = receipt_of(service.run(complete("a", temperature=1.0), CONTEXT)).seed
    other = receipt_of(service.run(complete("a", temperature=1.0), CONTEXT)).seed
    given = receipt_of(service.run(complete("a", temperature=1.0, seed=7), CONTEXT)).seed
    greedy = receipt_of(service.run(complete("a", seed=7), CONTEXT)).seed
    assert drawn is not None
    assert drawn != other
    assert drawn < 2**53
    assert (given, greedy) == (7, None)
    assert seeds == [drawn, other, 7, 7]


def test_texts_among_the_sampling_are_hashes() -> None:
    told = write(shown(stop=("secret",), temperature=0.5, top_p=0.9, seed=1)).sampling
    assert {name: told[name] for name in ("max_new_tokens", "temperature", "top_p")} == {
        "max_new_tokens": 4, "temperature": 0.5, "top_p": 0.9
    }  # fmt: skip
    assert len(told["stop"]) == 16
    assert "secret" not in told["stop"]
    assert told["stop"] != write(shown(stop=("other",))).sampling["stop"]


def test_a_receipt_is_small() -> None:
    row = shown(*PICTURES[:8], temperature=0.123456, top_p=0.9, top_k=40, seed=2**63 - 1, stop=("a", "b"))
    told = write(row, worker="idefics@worker-01.example.com", retries=3).model_dump_json()
    assert len(told) < 700
    assert len(write(shown(PICTURES[0])).model_dump_json()) < 350


@pytest.mark.parametrize("folder", ["/srv/models/cats", "./models/cats", "../cats"])
def test_no_path_is_in_a_receipt(folder: str) -> None:
    assert write(shown(), info=INFO.model_copy(update={"id": folder})).model == "cats"
    assert write(shown()).model == INFO.id


def test_outputs_have_hashes_by_tokens_or_label() -> None:
    outputs = [Output((1, 2), "stop"), Output((1,), "stop"), Output((), "stop", (0.9, 0.1)),
               Output((), "stop", (0.1, 0.9))]  # fmt: skip
    assert len({write(shown(), output).output for output in outputs}) == 4
    assert write(shown(), outputs[2]).output == write(shown(), Output((), "stop", (0.8, 0.2))).output


# Alone


def test_a_job_that_runs_alone_says_where_its_tokens_end(service: Service) -> None:
    context = JobContext("job", is_alone=True)
    assert receipt_of(service.run(complete("the red door", max_new_tokens=4), context)).token_ends == [1, 2, 3, 4]


class Seeing(FakeCodec):
    """The fake model's, but its prompts have their pictures."""

    def prepare(self, parts: PromptContent) -> Tokens:
        pictures = tuple(part for part in parts if isinstance(part, Picture))
        return replace(super().prepare(parts), pictures=pictures)


def test_a_job_that_runs_alone_has_the_receipt_that_it_has_in_company(start: Start) -> None:
    rows: list[Row] = []

    class Recording(FakeModel):
        def run(self, batch: Sequence[Row], heartbeat: SendHeartbeat, admit: Admit) -> None:
            rows.extend(batch)
            super().run(batch, heartbeat, admit)

    model = Recording()
    model.codec = Seeing()
    service, asked = start(model), job("caption", image=data_uri(png("red")))
    first = receipt_of(service.run(asked, CONTEXT))
    again = receipt_of(service.run(asked, JobContext("job", is_alone=True)))
    assert len(first.pixels) == 1
    assert first == again.model_copy(update={"token_ends": []})
    assert [row.alone for row in rows] == [False, True]
    assert rows[0].tokens.pictures[0].key != rows[1].tokens.pictures[0].key
