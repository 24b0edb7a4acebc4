"""Watchers of real jobs: they see stages and growing text, and end as the job ends, also if its worker dies."""

from __future__ import annotations

import os
import signal
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from celery import group

from tasks import Client, Complete, EndUpdate, RestartedUpdate, StageUpdate, TextUpdate, Update
from tasks.redis_keys import UPDATES
from tests.support.stand import Stand
from tests.support.waiting import PATIENCE_S

TEXT = "one two three four five six seven eight nine ten eleven twelve. " * 2
LONG = Complete(prompt=[TEXT], max_new_tokens=len(TEXT), stream=True)


@pytest.fixture(scope="module")
def client(held_up: Stand) -> Client:
    return Client(held_up.producer.server.url)


def shown(updates: list[Update]) -> str:
    """What a watcher has on the screen in the end."""
    text = ""
    for update in updates:
        if isinstance(update, RestartedUpdate):
            text = ""
        elif isinstance(update, TextUpdate):
            text += update.text
    return text


def end_of(updates: list[Update]) -> EndUpdate:
    end = updates[-1]
    assert isinstance(end, EndUpdate)
    return end


def told(watch: Iterator[Update], kind: type[Update]) -> list[Update]:
    """What a watch tells up to the first update of a kind."""
    updates = [next(watch)]
    while not isinstance(updates[-1], kind):
        updates.append(next(watch))
    return updates


def test_text_comes_while_it_is_written_to_watchers_that_know_the_id_alone(held_up: Stand, client: Client) -> None:
    job = client.submit(LONG)
    updates = list(Client(held_up.producer.server.url).job(job.id).watch(PATIENCE_S))
    assert sum(isinstance(update, TextUpdate) for update in updates) > 3
    assert shown(updates) == end_of(updates).result().text == TEXT
    plain = client.submit(LONG.model_copy(update={"stream": False})).result(PATIENCE_S)
    timed = {"timing", "metadata"}
    assert plain.model_dump(exclude=timed) == end_of(updates).result().model_dump(exclude=timed)
    # One who comes late sees all of it, in the same pieces.
    texts = [update for update in updates if isinstance(update, TextUpdate)]
    assert [update for update in job.watch(PATIENCE_S) if isinstance(update, TextUpdate)] == texts


def test_a_plain_celery_group_is_streamed_and_only_where_it_is_asked_for(held_up: Stand, client: Client) -> None:
    producer = held_up.producer
    asked = {"prompt": [TEXT], "max_new_tokens": 30}
    streamed, plain = (
        producer.app.signature("idefics.complete", kwargs={**asked, **more}, queue="idefics")
        for more in ({"stream": True}, {})
    )
    ids = [each.id for each in group(streamed, plain, streamed).apply_async().results]
    watched = [list(client.job(id).watch(PATIENCE_S)) for id in ids]
    assert [shown(updates) for updates in watched] == [TEXT[-30:], "", TEXT[-30:]]
    assert {end_of(updates).result().text for updates in watched} == {TEXT[-30:]}
    with producer.server.connect(1) as results:
        assert [results.exists(UPDATES.named(id)) for id in ids] == [1, 0, 1]
        assert 0 < results.ttl(UPDATES.named(ids[0])) <= 3_600


@pytest.mark.parametrize("several", [{}, {"n": 3, "temperature": 1.0}])
def test_a_job_whose_worker_dies_starts_its_text_anew(held_up: Stand, client: Client, several: dict[str, Any]) -> None:
    watch = client.submit(LONG.model_copy(update=several)).watch(PATIENCE_S)
    before = told(watch, TextUpdate)
    os.kill(held_up.producer.model_process(), signal.SIGKILL)
    after = list(watch)
    assert sum(isinstance(update, RestartedUpdate) for update in [*before, *after]) == 1
    assert shown([*before, *after]) == end_of(after).result().text == TEXT


def test_a_job_tells_that_it_loads_its_images(held_up: Stand, client: Client) -> None:
    name = uuid.uuid4().hex
    prompt: list[Any] = [{"image": held_up.gallery.held(name)}, TEXT]
    watch = client.submit(Complete(prompt=prompt, max_new_tokens=20, stream=True)).watch(PATIENCE_S)
    updates = [next(watch)]
    while updates[-1] != StageUpdate("loading_images"):
        updates.append(next(watch))
    held_up.gallery.release(name)
    updates += watch
    assert StageUpdate("running") in updates
    assert shown(updates) == TEXT[-20:]


def test_a_canceled_job_ends_with_the_text_so_far(held_up: Stand, client: Client) -> None:
    job = client.submit(LONG)
    watch = job.watch(PATIENCE_S)
    updates = told(watch, TextUpdate)
    job.cancel()
    updates += watch
    end = end_of(updates)
    assert end.status == "canceled"
    partial = end.outcome.partial  # type: ignore[union-attr]
    assert shown(updates) == partial.text
    assert TEXT.startswith(partial.text)


def test_a_waiting_jobs_position_falls_to_its_turn(held_up: Stand, client: Client) -> None:
    # More than the worker takes at once.
    jobs = client.submit_many([LONG] * 12)
    updates = list(jobs[-1].watch(PATIENCE_S))
    places = [update.ahead for update in updates if isinstance(update, StageUpdate) and update.ahead is not None]
    assert places
    assert places == sorted(places, reverse=True)
    assert places[0] < 12
    assert shown(updates) == TEXT


def test_many_watchers_of_one_job_see_the_same(client: Client) -> None:
    job = client.submit(LONG)
    seen: list[str] = []
    threads = [threading.Thread(target=lambda: seen.append(shown(list(job.watch(PATIENCE_S))))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [TEXT] * 8
