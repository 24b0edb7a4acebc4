"""Answers in company are those that the canary gets alone, on every family, and it uses no cache."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from tasks import Caption, Classify, ImagePath
from tasks.response_format import RegexFormat
from tasks.results import Receipt
from tests.model.conftest import Served
from tests.model.jobs import mixed_jobs, prepared, row_of
from tests.support.canary import outcomes
from tests.support.engines import running, submit
from tests.support.waiting import eventually
from worker.engine.engine import Engine
from worker.engine.grammar import Grammar
from worker.engine.row import Output, Row, Sampling
from worker.engine.scheduler import Limits
from worker.jobs import canary as module
from worker.jobs.canary import Canary
from worker.jobs.grammar_text import grammar_text
from worker.jobs.row_builder import joined, others

RECEIPT = Receipt(model="m", dtype="float32", prompt="p", output="o")


def rows_of(served: Served) -> list[Row]:
    """Rows of every kind: greedy, sampled, several samples, with beams, with labels, in a form."""
    names = sorted(served.images)[:3]
    jobs = [job.model_copy(update={"max_new_tokens": 6}) for job in mixed_jobs(5, names, seed=3)]
    beams = Caption(image=ImagePath(path=names[0]), num_beams=2, max_new_tokens=4)
    rows = [row_of(served.model, job, served.parts(job)) for job in (*jobs, beams)]
    labels = Classify(image=ImagePath(path=names[1]), labels=["a cat", "a red car"])
    parts = served.parts(labels)
    scored = Row(prepared(served.model, parts), Sampling(1))
    scored.labels = tuple(served.model.codec.encode_labels(parts[-2:], labels.labels))  # type: ignore[arg-type]
    sampled = Row(rows[0].tokens, Sampling(6, temperature=1.0).with_seed())
    several = Row(rows[1].tokens, Sampling(5, temperature=1.0, seed=2, answers=3))
    best = Row(rows[0].tokens, Sampling(4, num_beams=3, answers=2))
    tokenizer = served.model.codec.grammar_tokens().tokenizer()  # type: ignore[union-attr]
    form = RegexFormat(type="regex", regex="[a-z]{2,8}( [a-z]{2,8}){3}")
    grammar = Grammar(tokenizer, grammar_text(form, with_blank=True), drops_blank=True)
    formed = Row(rows[2].tokens, Sampling(8), grammar=grammar)
    return [*rows, scored, sampled, several, best, formed]


def outputs_of(engine: Engine, rows: Sequence[Row]) -> list[Output]:
    """The outputs of jobs in company, each with its further samples."""
    jobs = [[row, *others(row)] for row in rows]
    submit(engine, *itertools.chain(*jobs))
    return [joined([row.output.result() for row in job]) for job in jobs]


def test_the_canary_gets_the_answers_that_rows_had_in_company(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHECK_S", 0.01)
    before = outcomes()
    rows = rows_of(served)
    with running(served.model, Limits(rows=16, tokens=100_000)) as engine:
        outputs = outputs_of(engine, rows)
        encoded = served.model.metrics()["feature_misses"]
        prefixes = served.model.metrics()["prefix_hits"]
        canary = Canary(1.0, engine)
        for number, (row, output) in enumerate(zip(rows, outputs, strict=True)):
            canary.offer(str(number), row, output, RECEIPT)
        eventually(lambda: sum(outcomes().values()) - sum(before.values()) == len(rows))
    counted = {outcome: number - before[outcome] for outcome, number in outcomes().items()}
    assert counted == {"identical": len(rows), "diverged": 0, "dropped": 0, "failed": 0}
    runs = [row for job in rows for row in (job, *others(job))]
    shown = sum(len({picture.key for picture in row.tokens.pictures}) for row in runs)
    assert served.model.metrics()["feature_misses"] == encoded + shown
    assert served.model.metrics()["prefix_hits"] == prefixes
