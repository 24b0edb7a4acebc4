"""Answers used again: one row for identical jobs, on a real server."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from config.settings import Settings
from tasks.errors import DeadlineExceeded, OutOfMemory
from tasks.payloads import parse
from tasks.redis_keys import ANSWER
from tasks.results import ModelInfo
from worker.demo import stack
from worker.engine.engine import Engine
from worker.engine.row import Output, Picture, Row, Sampling, Tokens, TokenScore
from worker.engine.scheduler import Limits
from worker.jobs.answer_cache import AnswerCache, digest
from worker.jobs.runs import CancellationError, JobContext
from worker.jobs.service import Service
from worker.models.fake import FakeModel
from worker.models.fingerprint import fingerprint

MODEL = ModelInfo(id="fake", family="fake", dtype="float32")
#: Seconds that a test waits for what takes milliseconds.
SOON = 5.0


def row(text: str = "", *, picture: bytes = b"p", labels: tuple[tuple[int, ...], ...] = (), **sampling: Any) -> Row:
    ids = tuple(map(ord, text))
    return Row(Tokens(ids, (Picture(picture, None),)), Sampling(**{"max_new_tokens": 4, **sampling}), labels)


@pytest.fixture
def text() -> str:
    """A prompt that no other test has."""
    return uuid.uuid4().hex


@pytest.fixture
def answers(broker: stack.Broker) -> AnswerCache:
    return AnswerCache(broker.connect(1), 60)


class Model:
    """An engine whose rows end when the test says so."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._changed = threading.Condition()

    def compute(self, row: Row) -> Output:
        with self._changed:
            self.rows.append(row)
            self._changed.notify_all()
        return row.output.result()

    def await_rows(self, number: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.rows) >= number, SOON)

    def finish(self, text: str, why: Any = "length", number: int = -1) -> None:
        self.rows[number].finish(Output(tuple(map(ord, text)), why))


# What is identical


def test_what_changes_an_answer_changes_its_digest() -> None:
    rows = [
        row("a"), row("b"), row("a", picture=b"q"), row("a", max_new_tokens=5), row("a", num_beams=2),
        row("a", top_p=0.5), row("a", stop=(".",)), row("a", eos_ids=frozenset({7})), row("a", labels=((1,), (2,))),
        row("a", labels=((1, 2),)), row("a", temperature=1.0, seed=1), row("a", temperature=1.0, seed=2),
        row("a", min_p=0.1), row("a", repetition_penalty=1.1), row("a", presence_penalty=0.1),
        row("a", frequency_penalty=0.1), row("a", logit_bias=((5, 1.0),)), row("a", logprobs=0), row("a", answers=2),
    ]  # fmt: skip
    models = [MODEL, MODEL.model_copy(update={"revision": "abc"}), MODEL.model_copy(update={"dtype": "bfloat16"})]
    digests = {digest(one, model) for one in rows for model in models}
    assert len(digests) == len(rows) * len(models)
    assert digest(row("a", eos_ids=frozenset({1, 2, 3})), MODEL) == digest(
        row("a", eos_ids=frozenset({3, 2, 1})), MODEL
    )


def test_priority_and_deadline_do_not_change_an_answer() -> None:
    assert digest(row("a"), MODEL) == digest(replace(row("a"), priority=0, deadline=1.0), MODEL)


def test_sampled_answers_are_not_cached(answers: AnswerCache, text: str) -> None:
    model = Model()
    for number in range(2):
        chance = row(text, temperature=1.0)
        chance.finish(Output((number,), "length"))
        assert answers.output(chance, MODEL, model.compute).ids == (number,)
    assert digest(row(text, temperature=1.0), MODEL) is None


# Sharing


def test_identical_jobs_in_flight_share_one_row(answers: AnswerCache, text: str) -> None:
    model = Model()
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(answers.output, row(text), MODEL, model.compute) for _ in range(8)]
        model.await_rows(1)
        time.sleep(0.05)
        model.finish("cat")
        assert {future.result(SOON).ids for future in running} == {tuple(map(ord, "cat"))}
    assert len(model.rows) == 1


def test_a_finished_answer_is_used_again_by_any_worker(answers: AnswerCache, text: str, broker: stack.Broker) -> None:
    other = Output((3,), "length", confidence=0.5, scores=(TokenScore(3, -0.7),))
    scored = Output((), "stop", (0.25, 0.75), 0.75, (TokenScore(1, -0.25, ((1, -0.25), (2, -1.0))),), (other,))
    first = row(text, labels=((1,), (2,)))
    first.finish(scored)
    answers.output(first, MODEL, Model().compute)
    elsewhere, again = AnswerCache(broker.connect(1), 60), row(text, labels=((1,), (2,)))
    assert asdict(elsewhere.output(again, MODEL, Model().compute)) == asdict(scored)
    assert again.cached_images == 1
    assert 0 < broker.connect(1).ttl(ANSWER.named(digest(again, MODEL))) <= 60


def test_other_weights_in_the_same_folder_do_not_give_the_old_answers(
    tmp_path: Path, text: str, broker: stack.Broker
) -> None:
    model = Model()
    for number, weights in enumerate((b"old", b"newer")):
        (tmp_path / "model.safetensors").write_bytes(weights)
        answers = AnswerCache(broker.connect(1), 60, fingerprint(tmp_path))
        for _ in range(2):
            asked = row(text)
            asked.finish(Output((number,), "length"))
            assert answers.output(asked, MODEL, model.compute).ids == (number,)
    assert len(model.rows) == 2


def test_weights_are_told_apart_by_their_content_alone(tmp_path: Path) -> None:
    checkpoint, cache = tmp_path / "checkpoint", tmp_path / "cache"
    checkpoint.mkdir()
    file = checkpoint / "model.safetensors"
    file.write_bytes(b"a" * 1000)
    (checkpoint / "folder").mkdir()
    first, times = fingerprint(checkpoint, cache), file.stat()
    file.write_bytes(b"b" * 1000)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    other = fingerprint(checkpoint, cache)
    assert first != other
    # Hashed once: what the cache keeps is taken.
    assert len(list(cache.iterdir())) == 2
    for kept in cache.iterdir():
        kept.write_text("known")
    assert fingerprint(checkpoint, cache) not in (first, other)
    assert fingerprint(checkpoint) == other
    file.write_bytes(b"a" * 1000)
    assert fingerprint(checkpoint, tmp_path / "file" / "where" / "none can be") == first


@pytest.mark.parametrize("why", ["canceled", "deadline"])
def test_an_interrupted_answer_is_not_shared(answers: AnswerCache, text: str, why: str) -> None:
    model = Model()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(answers.output, row(text), MODEL, model.compute)
        model.await_rows(1)
        second = pool.submit(answers.output, row(text), MODEL, model.compute)
        time.sleep(0.05)
        model.finish("c", why)
        model.await_rows(2)
        model.finish("cat")
        assert first.result(SOON).finish_reason == why
        assert second.result(SOON).finish_reason == "length"


def test_an_error_is_not_shared(answers: AnswerCache, text: str) -> None:
    model = Model()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(answers.output, row(text), MODEL, model.compute)
        model.await_rows(1)
        second = pool.submit(answers.output, row(text), MODEL, model.compute)
        time.sleep(0.05)
        model.rows[0].fail(OutOfMemory("full"))
        model.await_rows(2)
        model.finish("cat")
        with pytest.raises(OutOfMemory):
            first.result(SOON)
        assert second.result(SOON).ids == tuple(map(ord, "cat"))


def test_a_job_that_waits_for_anothers_row_can_be_canceled(answers: AnswerCache, text: str) -> None:
    model, waiting = Model(), row(text)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(answers.output, row(text), MODEL, model.compute)
        model.await_rows(1)
        second = pool.submit(answers.output, waiting, MODEL, model.compute)
        waiting.canceled = True
        model.await_rows(2)
        model.finish("", "canceled")
        assert second.result(SOON).finish_reason == "canceled"
        model.finish("cat", number=0)
        assert first.result(SOON).finish_reason == "length"


def test_without_redis_a_job_is_computed(text: str) -> None:
    away = redis.Redis(port=stack.free_port(), retry=Retry(NoBackoff(), 0))
    done = row(text)
    done.finish(Output((1,), "length"))
    assert AnswerCache(away, 60).output(done, MODEL, Model().compute).ids == (1,)


# In the service


@pytest.fixture
def run(answers: AnswerCache) -> Any:
    """Runs a job on a model that counts its batches."""
    model = FakeModel(0.02)
    engine = Engine(model, Limits(rows=8, tokens=1_000_000))
    engine.start()
    service = Service(Settings(), model.info, model.codec, engine, answers)

    def run(text: str, id: str = "job", **fields: Any) -> Any:
        job = parse("idefics.complete", {"prompt": [text], "max_new_tokens": 10, **fields})
        return service.run(job, JobContext(id=id, submitted_at=time.time()))

    run.batches, run.cancel = model.batches, service.cancel  # type: ignore[attr-defined]
    yield run
    engine.stop()


def test_each_job_has_its_own_figures_and_metadata(run: Callable[..., Any], text: str) -> None:
    first, again = run(text, metadata={"row": 1}), run(text, metadata={"row": 2})
    assert run.batches == [1]  # type: ignore[attr-defined]
    assert (first.text, first.usage, first.model) == (again.text, again.usage, again.model)
    assert (first.metadata, again.metadata) == ({"row": 1}, {"row": 2})
    assert first.timing.generate_s >= 0.2 > 0.1 > again.timing.generate_s + again.timing.wait_s


def test_a_follower_that_is_canceled_or_late_ends_and_the_leader_goes_on(run: Callable[..., Any], text: str) -> None:
    with ThreadPoolExecutor(3) as pool:
        leader = pool.submit(run, text * 10, "leader", max_new_tokens=40)
        time.sleep(0.1)
        canceled = pool.submit(run, text * 10, "canceled", max_new_tokens=40)
        late = pool.submit(run, text * 10, "late", max_new_tokens=40, deadline_s=0.2)
        time.sleep(0.1)
        run.cancel("canceled")  # type: ignore[attr-defined]
        with pytest.raises(CancellationError):
            canceled.result(SOON)
        with pytest.raises(DeadlineExceeded):
            late.result(SOON)
        assert leader.result(SOON).finish_reason == "length"
