"""Doubtful answers from a plain Celery producer to a person's decision and its signed callback, by real workers."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tasks import Client
from tasks.apps import app_at
from tasks.outbox import Outbox, outbox_of
from tasks.review import ReviewList, review_list
from tasks.webhooks import Review, verify
from tests.support.gallery import PNG, Gallery
from tests.support.pictures import data_uri
from tests.support.receiver import SECRET, Receiver
from tests.support.stand import Producer, callbacks_worker, command, stand
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack
from worker.models.fake import UNSURE


@dataclass(frozen=True)
class Office:
    """A worker, a callbacks worker, a receiver, and the reviewers' list."""

    server: stack.Broker
    receiver: Receiver
    reviews: ReviewList
    outbox: Outbox

    def ask(self, **arguments: Any) -> tuple[str, dict[str, Any]]:
        """A doubtful job's id and its result as JSON, sent by name as any Celery producer does."""
        kwargs = {"prompt": [data_uri(PNG), f"{UNSURE} a red door"], "max_new_tokens": 4, **arguments}
        job = Producer(self.server).app.send_task("idefics.complete", kwargs=kwargs, queue="idefics")
        return job.id, job.get(timeout=PATIENCE_S)

    @property
    def callback(self) -> dict[str, Any]:
        return {"url": self.receiver.url, "key_id": "main"}


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    logs = tmp_path_factory.mktemp("review")
    with Receiver().open() as receiver, Gallery().open() as gallery, stack.broker() as server:
        settings = {
            "MODEL": "fake",
            "CALLBACK_KEYS": f"main={SECRET}",
            "CALLBACK_ALLOW_HTTP": "true",
            "CALLBACK_ALLOW_NETWORKS": "127.0.0.0/8",
            "CALLBACK_PORTS": str(receiver.port),
        }
        with (
            callbacks_worker(server, logs / "callbacks", settings),
            stand(server, gallery, logs / "worker", **settings),
        ):
            app = app_at(server.url, None)
            yield Office(server, receiver, ReviewList(app), outbox_of(app))


def test_a_persons_decision_reaches_the_producer_and_an_undone_one_does_not(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    id, result = office.ask(min_confidence=0.8, callback=office.callback, metadata={"row": 7})
    assert (result["text"], result["abstained"], result["confidence"]) == ("door", True, 0.5)
    assert Client(office.server.url).result(id, PATIENCE_S).abstained
    assert "abstained" not in office.ask(min_confidence=0.4)[1]

    (item,) = office.reviews.waiting()
    assert (item.id, item.answer, item.asked, item.metadata) == (
        id, "door", f"[picture]\n{UNSURE} a red door", {"row": 7},
    )  # fmt: skip
    assert (office.reviews.picture(id, 0) or b"").startswith(b"\xff\xd8\xff")
    shown = json.loads(command(office.server, "tasks", "review", "ls", "--json"))
    assert shown["id"] == id

    reviewers = [ReviewList(app_at(office.server.url, None)) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        decided = list(threads.map(lambda one, answer: one.decide(id, answer), reviewers, ("gate", "wall")))
    assert sorted(decided) == [False, True]
    assert office.reviews.undo(id)
    assert office.outbox.counts()["pending"] == 0

    monkeypatch.setattr(review_list, "WAIT_S", 0.0)
    assert office.reviews.decide(id, "a gate")
    eventually(lambda: len(office.receiver.calls) == 2)
    events = [verify(SECRET, call.headers, call.body) for call in office.receiver.calls]
    assert [event.type for event in events] == ["job.succeeded", "job.reviewed"]
    assert events[0].data.result.abstained  # type: ignore[union-attr]
    assert events[1].data == Review(
        id=id, task="idefics.complete", answer="a gate", model_answer="door", confidence=0.5, metadata={"row": 7}
    )
    eventually(lambda: office.outbox.counts()["delivered"] == 2)
    assert not office.reviews.undo(id)


def test_a_campaign_has_a_column_of_abstained_rows(office: Office, tmp_path: Path) -> None:
    before = office.reviews.count()
    (tmp_path / "in.csv").write_text(f"id,ask\n1,a red door\n2,{UNSURE} a red door\n")
    columns = ("--task", "complete", "--set", 'prompt=["{ask}"]', "--set", "max_new_tokens=4")
    chosen = ("--set", "min_confidence=0.7", "--column", "abstained=abstained", "--column", "confidence=confidence")
    command(office.server, "tasks", "run", str(tmp_path / "in.csv"), str(tmp_path / "out.csv"), *columns, *chosen)
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert [(row["text"], row["confidence"], row["abstained"]) for row in rows] == [
        ("door", "1.0", "false"),
        ("door", "0.5", "true"),
    ]
    assert office.reviews.count() == before + 1
