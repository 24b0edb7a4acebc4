"""The review list: its bounds, its order, and decisions of several reviewers."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from celery import Celery
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from tasks import ConfigurationError, InvalidRequest
from tasks.apps import app_at
from tasks.outbox import Outbox
from tasks.review import RankedAnswer, ReviewBounds, ReviewList, review_list, scripts
from tests.unit.review.listed import HOOK, WIDE, ids, item, put
from worker.demo.stack import Broker

BYTES = scripts.KEYS[7]
UNSENT = scripts.KEYS[3]


@pytest.fixture
def results(broker: Broker) -> Redis:
    return broker.connect(1)


# Items


def test_items_are_listed_the_oldest_first(reviews: ReviewList) -> None:
    young, old = item("young"), item("old", age_s=60)
    put(reviews, young, old)
    assert reviews.waiting() == [old, young]
    assert reviews.waiting(limit=1) == [old]
    assert reviews.waiting(limit=0) == []
    assert reviews.count() == 2
    assert (reviews.get("old"), reviews.get("none")) == (old, None)


def test_pictures_are_read_one_by_one(reviews: ReviewList) -> None:
    reviews.put(item("a", pictures=2), [b"first", b"other one"], WIDE)
    assert [reviews.picture("a", index) for index in (0, 1, 2, -1)] == [b"first", b"other one", None, None]
    assert reviews.picture("none", 0) is None


def test_a_job_that_runs_again_is_one_item(reviews: ReviewList) -> None:
    again = item("a", confidence=0.5)
    put(reviews, item("a", age_s=60), again)
    assert reviews.waiting() == [again]


def test_another_run_of_a_decided_job_changes_nothing(reviews: ReviewList) -> None:
    put(reviews, item("a"), submitted_at=1_700_000_000.25)
    assert reviews.decide("a", "dog")
    assert not reviews.put(item("a"), [], WIDE, submitted_at=1_700_000_000.25)
    assert ids(reviews) == []
    # A new job with its id.
    assert reviews.put(item("a"), [], WIDE, submitted_at=1_700_000_099.25)
    assert (ids(reviews), reviews.decision("a")) == (["a"], None)


def test_an_item_of_a_newer_worker_is_read(reviews: ReviewList, results: Redis) -> None:
    put(reviews, item("a"), callback=HOOK)
    stored: Any = results.hget(scripts.KEYS[4], "a")
    entry = json.loads(stored)
    entry["item"]["answers"][0]["later"] = entry["item"]["later"] = entry["later"] = 1
    results.hset(scripts.KEYS[4], "a", json.dumps(entry))
    assert ids(reviews) == ["a"]
    assert reviews.decide("a", "cat")


def test_an_app_without_redis_results_is_refused() -> None:
    with pytest.raises(ConfigurationError):
        ReviewList(Celery(backend="rpc://"))


# Bounds


def test_the_oldest_go_when_there_are_too_many(reviews: ReviewList) -> None:
    bounds = ReviewBounds(3, 1_000_000, 3_600)
    put(reviews, *(item(str(n), age_s=10 - n) for n in range(3)), bounds=bounds)
    assert reviews.decide("0", "cat")
    # The decision is younger than the items that wait.
    put(reviews, item("3", age_s=0), bounds=bounds)
    assert ids(reviews) == ["2", "3"]
    put(reviews, item("4"), item("5"), item("6"), bounds=bounds)
    assert (ids(reviews), list(reviews.decisions())) == (["4", "5", "6"], [])


def test_the_oldest_go_when_all_are_too_large(reviews: ReviewList, results: Redis) -> None:
    bounds = ReviewBounds(100, 20_000, 3_600)
    for number in range(5):
        reviews.put(item(str(number), age_s=10 - number, pictures=1), [b"x" * 8_000], bounds)
    assert ids(reviews) == ["3", "4"]
    stored = sum(len(value) for key in scripts.KEYS[4:7] for value in results.hvals(key))
    assert int(results.get(BYTES)) == stored  # type: ignore[arg-type]


def test_one_that_is_larger_than_the_whole_list_pushes_nothing_out(reviews: ReviewList) -> None:
    put(reviews, item("a"))
    with pytest.raises(ValueError, match="IDEFICS_REVIEW_MAX_BYTES"):
        reviews.put(item("b"), [b"x" * 2_000], ReviewBounds(100, 2_000, 3_600))
    assert ids(reviews) == ["a"]


def test_old_ones_go_and_every_key_ends_by_itself(reviews: ReviewList, results: Redis) -> None:
    bounds = ReviewBounds(100, 1_000_000, 60)
    put(reviews, item("old", age_s=61), item("a"), item("b", pictures=1), bounds=bounds, callback=HOOK)
    assert ids(reviews) == ["a", "b"]
    assert reviews.decide("a", "cat")
    assert reviews.undo("a")
    found = list(results.scan_iter())
    assert found
    assert all(0 < results.ttl(key) <= 60 for key in found)  # type: ignore[operator]


@pytest.mark.parametrize("key", scripts.KEYS)
def test_a_key_that_was_deleted_alone_stops_nothing(reviews: ReviewList, results: Redis, key: str) -> None:
    put(reviews, *(item(str(n)) for n in range(3)))
    reviews.decide("0", None)
    results.delete(key)
    put(reviews, *(item(f"new {n}") for n in range(3)), bounds=ReviewBounds(2, 1_000_000, 3_600))
    assert ids(reviews) == ["new 1", "new 2"]


# Decisions


def test_a_decision_is_kept_with_its_item(reviews: ReviewList) -> None:
    first, other = item("a", age_s=2), item("b", age_s=1)
    put(reviews, first, other)
    assert reviews.decide("b", None)
    assert reviews.decide("a", "dog")
    found = list(reviews.decisions())
    assert [(one, decision.answer) for one, decision in found] == [(other, None), (first, "dog")]
    assert time.time() - found[1][1].decided < 60
    assert (reviews.count(), reviews.get("a")) == (0, first)


def test_of_two_reviewers_one_decides(app: Celery, broker: Broker, reviews: ReviewList) -> None:
    put(reviews, *(item(str(n)) for n in range(20)), callback=HOOK)
    others = [ReviewList(app_at(broker.url, None)) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for n in range(20):
            decided = list(threads.map(lambda one, n=n: one.decide(str(n), "cat"), others))  # type: ignore[misc]
            assert sorted(decided) == [False, False, False, True]
    assert len(list(reviews.decisions())) == 20


def test_what_is_gone_or_too_long_is_not_decided(reviews: ReviewList) -> None:
    assert not reviews.decide("none", "cat")
    put(reviews, item("a"))
    with pytest.raises(InvalidRequest):
        reviews.decide("a", "x" * 4_001)
    assert ids(reviews) == ["a"]


def test_an_answer_of_the_models_own_may_be_long(reviews: ReviewList) -> None:
    long = "x" * 20_000
    put(reviews, item("a", answers=(RankedAnswer(long, 0.5),)))
    assert reviews.decide("a", long)
    assert [decision.answer for _, decision in reviews.decisions()] == [long]


def test_an_undone_item_waits_in_its_old_place_with_its_pictures(reviews: ReviewList) -> None:
    put(reviews, item("a", age_s=60, pictures=1), item("b"))
    reviews.decide("a", "dog")
    assert reviews.undo("a")
    assert ids(reviews) == ["a", "b"]
    assert (reviews.picture("a", 0), list(reviews.decisions())) == (b"jpeg", [])
    assert not reviews.undo("a")
    assert not reviews.undo("none")
    assert reviews.decide("a", "cat")


def test_after_some_minutes_a_decision_stays_and_its_pictures_go(
    reviews: ReviewList, monkeypatch: pytest.MonkeyPatch, results: Redis
) -> None:
    put(reviews, item("a", pictures=1), item("b", pictures=1))
    reviews.decide("a", "cat")
    monkeypatch.setattr(review_list, "UNDO_S", 0.0)
    assert not reviews.undo("a")
    reviews.decide("b", "cat")
    assert (reviews.picture("a", 0), reviews.picture("b", 0)) == (None, b"jpeg")
    stored = sum(len(value) for key in scripts.KEYS[4:7] for value in results.hvals(key))
    assert int(results.get(BYTES)) == stored  # type: ignore[arg-type]


# Callbacks


def test_a_decisions_callback_goes_out_after_a_pause_in_which_it_can_be_undone(
    reviews: ReviewList, outbox: Outbox
) -> None:
    put(reviews, item("a"), item("plain"))
    put(reviews, item("b"), callback=HOOK)
    for id in ("a", "b"):
        assert reviews.decide(id, "dog")
    (delivery,) = outbox.listed("pending", 10)
    assert (delivery.job, delivery.event, delivery.url, delivery.key_id) == ("b", "job.reviewed", *HOOK)
    assert outbox.claim(10, 60) == []
    assert reviews.undo("b")
    assert outbox.counts()["pending"] == 0
    assert outbox.bytes() == {}
    # Decided again it is another delivery.
    assert reviews.decide("b", "cat")
    (again,) = outbox.listed("pending", 10)
    assert again.id != delivery.id


@pytest.mark.parametrize("state", ["claimed", "attempted", "delivered"])
def test_what_has_gone_out_is_not_undone(
    reviews: ReviewList, outbox: Outbox, state: str, monkeypatch: pytest.MonkeyPatch, results: Redis
) -> None:
    monkeypatch.setattr(review_list, "WAIT_S", 0.0)
    put(reviews, item("a"), callback=HOOK)
    reviews.decide("a", "dog")
    (delivery,) = outbox.claim(10, 60)
    if state == "attempted":
        outbox.again(delivery, 60, "status 503")
    elif state == "delivered":
        outbox.end(delivery, "delivered", "status 204", 60)
    assert not reviews.undo("a")
    assert [decision.answer for _, decision in reviews.decisions()] == ["dog"]
    assert results.zcard(UNSENT) == 0


def test_a_decision_during_which_the_process_was_killed_is_sent_by_the_next_reviewer(
    reviews: ReviewList, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(reviews, item("a"), callback=HOOK)
    with monkeypatch.context() as away:
        away.setattr(Outbox, "add", _raise)
        assert reviews.decide("a", "dog")
    assert outbox.counts()["pending"] == 0
    reviews.waiting()
    assert outbox.counts()["pending"] == 0
    monkeypatch.setattr(review_list, "UNSENT_S", 0.0)
    reviews.waiting()
    assert outbox.counts()["pending"] == 1
    reviews.waiting()
    assert outbox.counts()["pending"] == 1


def test_an_unsent_decision_can_be_undone(reviews: ReviewList, monkeypatch: pytest.MonkeyPatch) -> None:
    put(reviews, item("a"), callback=HOOK)
    with monkeypatch.context() as away:
        away.setattr(Outbox, "add", _raise)
        assert reviews.decide("a", "dog")
    assert reviews.undo("a")
    assert ids(reviews) == ["a"]


def _raise(*_: Any) -> None:
    raise RedisConnectionError("away")
