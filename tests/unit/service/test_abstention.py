"""Jobs with `min_confidence`: when they abstain, and what is put on the review list."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from config.settings import Settings
from tasks.apps import app_at
from tasks.outbox import outbox_of
from tasks.payloads import Job
from tasks.results import Choice, Result
from tasks.review import RankedAnswer, ReviewBounds, ReviewList
from tests.support.pictures import data_uri, png
from tests.unit.service.jobs import CONTEXT, complete, job
from worker.demo.stack import Broker
from worker.engine.engine import Engine
from worker.engine.scheduler import Limits
from worker.images import copies
from worker.images.copies import PictureCopies
from worker.jobs import asked as asked_module
from worker.jobs.answer_cache import AnswerCache
from worker.jobs.asked import asked
from worker.jobs.reviews import Reviews, ranked
from worker.jobs.runs import CancellationError, JobContext
from worker.jobs.service import Service
from worker.models.fake import UNSURE, FakeModel
from worker.observability.metrics import WORKER

WIDE = ReviewBounds(items=100, bytes=10_000_000, ttl_s=3_600)
HOOK = {"url": "https://shop.test/hook", "key_id": "main"}


@pytest.fixture
def reviews(broker: Broker) -> Iterator[ReviewList]:
    yield ReviewList(app_at(broker.url, None))
    broker.connect(1).flushdb()


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(FakeModel(), Limits(rows=8, tokens=1_000_000))
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture
def service(engine: Engine, reviews: ReviewList) -> Service:
    return serving(engine, reviews)


def serving(engine: Engine, reviews: ReviewList, **options: Any) -> Service:
    model = FakeModel()
    return Service(Settings(), model.info, model.codec, engine, reviews=Reviews(reviews, WIDE), **options)


def unsure(min_confidence: float | None = 0.8, **arguments: Any) -> Job:
    return complete(f"{UNSURE} the red door", max_new_tokens=4, min_confidence=min_confidence, **arguments)


def colour(jpeg: bytes | None) -> tuple[int, ...]:
    """About the colour of a picture's first pixel."""
    assert jpeg is not None
    pixel: Any = Image.open(io.BytesIO(jpeg)).getpixel((0, 0))
    return tuple(round(value / 255) for value in pixel)


# The result


@pytest.mark.parametrize(
    ("asks", "is_abstained"),
    [
        (unsure(0.8), True),
        (unsure(0.5), False),
        (unsure(0.0), False),
        (unsure(None), False),
        (unsure(0.8, n=2, temperature=1.0), True),
        (unsure(0.8, num_beams=2), True),
        (complete("the red door", min_confidence=1.0), False),
        (job("classify", image=data_uri(png()), labels=[f"cat {UNSURE}", "dog"], min_confidence=0.6), True),
        (job("classify", image=data_uri(png()), labels=["cat", "dog"], min_confidence=0.6), False),
    ],
)
def test_a_job_abstains_below_its_min_confidence(service: Service, asks: Job, is_abstained: bool) -> None:
    result = service.run(asks, CONTEXT)
    assert result.abstained == is_abstained
    stored = result.model_dump(mode="json")
    assert stored.get("abstained", False) == is_abstained
    assert ("abstained" in stored) == is_abstained
    assert Result.model_validate(stored) == result


def test_an_abstained_result_has_the_answer_that_it_would_have_had(service: Service) -> None:
    doubtful, plain = service.run(unsure(0.8), CONTEXT), service.run(unsure(None), CONTEXT)
    same = ("text", "finish_reason", "confidence", "usage", "receipt")
    assert [getattr(doubtful, name) for name in same] == [getattr(plain, name) for name in same]


def test_abstained_jobs_are_counted_by_task(service: Service) -> None:
    def counted() -> float:
        return WORKER.get_sample_value("idefics_abstained_total", {"task": "idefics.complete"}) or 0.0

    before = counted()
    service.run(unsure(), CONTEXT)
    service.run(unsure(None), CONTEXT)
    assert counted() == before + 1


def test_an_interrupted_job_does_not_abstain(reviews: ReviewList) -> None:
    model = FakeModel(step_s=0.01)
    engine = Engine(model, Limits(rows=8, tokens=1_000_000))
    engine.start()
    try:
        service = serving(engine, reviews)
        long: dict[str, Any] = {"max_new_tokens": 500, "min_confidence": 0.9}
        late = service.run(
            complete(UNSURE + "a" * 600, deadline_s=0.3, **long), JobContext("late", submitted_at=time.time())
        )
        assert (late.finish_reason, late.abstained, late.confidence) == ("deadline", False, 0.5)
        threading.Timer(0.2, service.cancel, ["canceled"]).start()
        with pytest.raises(CancellationError) as canceled:
            service.run(complete(UNSURE + "a" * 600, **long), JobContext("canceled"))
        assert canceled.value.partial is None or not canceled.value.partial.abstained
    finally:
        engine.stop()
    assert reviews.count() == 0


def test_a_reused_answer_abstains_as_its_own_job_asks(engine: Engine, reviews: ReviewList, broker: Broker) -> None:
    service = serving(engine, reviews, answers=AnswerCache(broker.connect(1), 60))
    first = service.run(unsure(None), JobContext("first"))
    again = service.run(unsure(0.8), JobContext("again"))
    assert again.receipt is not None
    assert again.receipt.cached
    assert (first.text, first.abstained) == (again.text, not again.abstained)
    assert service.run(unsure(0.4), JobContext("third")).abstained is False
    assert [item.id for item in reviews.waiting()] == ["again"]


# The list


def test_an_abstained_job_is_on_the_list_with_what_a_person_needs(service: Service, reviews: ReviewList) -> None:
    labels = [f"cat {UNSURE}", "dog", "bird"]
    asks = job(
        "classify", image=data_uri(png("red")), labels=labels, min_confidence=0.75, metadata={"row": 7}, callback=HOOK,
        examples=[{"image": data_uri(png("blue")), "label": "dog"}],
    )  # fmt: skip
    service.run(asks, JobContext("a", submitted_at=1_700_000_000.0))
    (item,) = reviews.waiting()
    assert (item.id, item.task, item.answer) == ("a", "idefics.classify", labels[0])
    assert item.asked == f"Which of these is it? cat {UNSURE}, dog, bird"
    assert {(each.text, each.confidence) for each in item.answers} == {(labels[0], 0.5), ("dog", 0.5), ("bird", 0.0)}
    assert item.answers[2].text == "bird"
    assert (item.confidence, item.min_confidence, item.metadata) == (0.5, 0.75, {"row": 7})
    assert (item.model, item.revision, time.time() - item.created < 60) == ("fake", None, True)
    # Of the example there is no picture.
    assert (item.pictures, colour(reviews.picture("a", 0)), reviews.picture("a", 1)) == (1, (1, 0, 0), None)
    assert service.run(unsure(None), JobContext("b")).text
    assert reviews.count() == 1


@pytest.mark.parametrize(
    ("events", "is_sent"), [([], True), (["job.reviewed"], True), (["job.failed", "job.succeeded"], False)]
)
def test_a_decision_is_sent_if_the_callback_names_it_or_no_event(
    service: Service, reviews: ReviewList, broker: Broker, events: list[str], is_sent: bool
) -> None:
    service.run(unsure(callback={**HOOK, "events": events}), CONTEXT)
    assert reviews.decide("job", "door")
    pending = outbox_of(app_at(broker.url, None)).listed("pending", 10)
    broker.connect(0).flushdb()
    assert [(each.event, each.url) for each in pending] == [("job.reviewed", HOOK["url"])] * is_sent


@pytest.mark.parametrize("held_bytes", [copies.HELD_BYTES, 5_000])
def test_copies_are_small_and_of_the_last_four_pictures(
    service: Service, reviews: ReviewList, monkeypatch: pytest.MonkeyPatch, held_bytes: int
) -> None:
    monkeypatch.setattr(copies, "HELD_BYTES", held_bytes)
    large = io.BytesIO()
    Image.effect_noise((1_600, 900), 80).convert("RGB").save(large, "JPEG", quality=95)
    assert len(large.getvalue()) > 5_000
    pictures = [data_uri(png(name)) for name in ("blue", "red", "lime", "white")]
    shown = [*pictures, data_uri(large.getvalue(), "image/jpeg")]
    service.run(job("complete", prompt=[*shown, UNSURE], min_confidence=0.8), CONTEXT)
    (item,) = reviews.waiting()
    assert item.pictures == 4
    found = [reviews.picture("job", index) for index in range(4)]
    assert [colour(each) for each in found[:3]] == [(1, 0, 0), (0, 1, 0), (1, 1, 1)]
    copy = Image.open(io.BytesIO(found[3] or b""))
    assert (copy.format, copy.size) == ("JPEG", (768, 432))
    assert "exif" not in copy.info


def test_files_are_held_up_to_a_limit_and_copied_at_once_beyond_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "HELD_BYTES", 10)
    copied: list[bytes] = []

    def copy(data: bytes) -> bytes:
        copied.append(data)
        return data[:1]

    first, second = (PictureCopies(range(2), copy) for _ in range(2))
    first.keep(0, b"a" * 8)
    second.keep(0, b"b" * 8)
    assert copied == [b"b" * 8]
    del first
    second.keep(1, b"c" * 8)
    assert copied == [b"b" * 8]
    assert second.jpegs() == [b"b", b"c"]


def test_what_fails_beside_a_job_is_logged_and_the_job_succeeds(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reviews: ReviewList
) -> None:
    monkeypatch.setattr("worker.images.loader.small_copy", _fail)
    assert serving(engine, reviews).run(_shown(), CONTEXT).abstained
    (item,) = reviews.waiting()
    assert (item.pictures, "no copy" in caplog.text) == (0, True)

    away = Redis(port=1, retry=Retry(NoBackoff(), 0), socket_timeout=1)
    result = serving(engine, ReviewList(app_at("redis://127.0.0.1:1/0", None), away)).run(_shown(), JobContext("b"))
    assert result.abstained
    (record,) = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert "The doubtful answer of job b is not on the review list" in record.getMessage()


def test_one_that_is_too_large_is_logged(engine: Engine, reviews: ReviewList, caplog: pytest.LogCaptureFixture) -> None:
    model = FakeModel()
    small = Reviews(reviews, ReviewBounds(items=100, bytes=100, ttl_s=60))
    assert Service(Settings(), model.info, model.codec, engine, reviews=small).run(unsure(), CONTEXT).abstained
    assert "IDEFICS_REVIEW_MAX_BYTES" in caplog.text
    assert reviews.count() == 0


def test_without_a_list_a_job_abstains_all_the_same(engine: Engine) -> None:
    model = FakeModel()
    assert Service(Settings(), model.info, model.codec, engine).run(unsure(), CONTEXT).abstained


def test_a_run_that_verifies_an_answer_is_not_reviewed(service: Service, reviews: ReviewList) -> None:
    assert service.run(unsure(), JobContext("verified", is_alone=True)).abstained
    assert reviews.count() == 0


def test_no_picture_is_copied_for_a_job_that_does_not_ask(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.jobs.service.picture_copies", _fail)
    assert service.run(job("caption", image=data_uri(png())), CONTEXT)


# For people


@pytest.mark.parametrize(
    ("asks", "text"),
    [
        (job("caption", image=data_uri(png())), "Describe this image."),
        (job("caption", image=data_uri(png()), prompt="A photo of"), "Describe this image.\nA photo of"),
        (job("answer", image=data_uri(png()), question="Who?"), "Who?"),
        (job("classify", image=data_uri(png()), labels=["a", "b"]), "Which of these is it? a, b"),
        (job("write", images=[data_uri(png())], instruction="Write."), "Write.\nStory:"),
        (job("complete", prompt=["User:", data_uri(png()), " what?"]), "User:\n[picture]\nwhat?"),
        (
            job(
                "chat",
                messages=[
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": [
                        {"type": "text", "text": "Who?"},
                        {"type": "image_url", "image_url": {"url": data_uri(png())}},
                    ]},
                ],
            ),
            "System: Be brief.\nUser: Who? [picture]",
        ),
    ],
)  # fmt: skip
def test_what_was_asked_is_one_text(asks: Job, text: str) -> None:
    assert asked(asks) == text


def test_of_a_long_text_both_ends_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked_module, "MAX_CHARS", 27)
    assert asked(complete("0123456789" * 5)) == "0123456789 [...] 0123456789"


def test_answers_are_ranked_and_each_is_named_once(service: Service) -> None:
    choices = [Choice(text=text, finish_reason="stop", confidence=value) for text, value in
               (("a", 0.2), ("b", 0.5), ("a", 0.3), ("c", None))]  # fmt: skip
    result = service.run(unsure(), CONTEXT).model_copy(update={"choices": choices})
    assert ranked(result) == (RankedAnswer("b", 0.5), RankedAnswer("a", 0.3), RankedAnswer("c", 0.0))


def _shown() -> Job:
    return job("complete", prompt=[data_uri(png()), UNSURE], min_confidence=0.8)


def _fail(*_: Any) -> Any:
    raise ValueError("no")
