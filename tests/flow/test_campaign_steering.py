"""Workers hold back the jobs of a paused campaign and end those of a canceled one, whoever says so from wherever."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from tasks import Client, Complete, JobCanceled, JobError, SubmittedJob
from tasks.campaign.control import CampaignControl, CampaignInfo
from tasks.campaign.directory import Campaigns
from tasks.redis_keys import CANCELLATION
from tests.support.gallery import Gallery
from tests.support.stand import SLOTS, Stand, command, stand
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack
from worker.queue.campaigns import MAX_COUNTDOWN_S, MIN_COUNTDOWN_S

#: Seconds within which a pause takes effect.
EFFECT_S = 2.0
INFO = CampaignInfo("shoes", "idefics.complete", "shoes.csv", "out.csv", "here")
#: Takes 10 s, unless it is ended.
ENDLESS = Complete(prompt=["abcdefghij" * 50], max_new_tokens=500)


@pytest.fixture(scope="module")
def stood(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """A worker whose jobs have no retry to use up."""
    log = tmp_path_factory.mktemp("campaigns") / "log"
    with (
        Gallery().open() as gallery,
        stack.broker() as server,
        stand(server, gallery, log, MAX_RETRIES="0") as stood,
    ):
        yield stood


@pytest.fixture
def client(stood: Stand) -> Client:
    return Client(stood.producer.server.url)


@pytest.fixture
def control(client: Client) -> CampaignControl:
    control = CampaignControl(client.app, uuid.uuid4().hex)
    control.register(INFO)
    return control


def steer(stood: Stand, order: str, control: CampaignControl) -> list[dict[str, Any]]:
    """Give an order from another process."""
    said = command(stood.producer.server, "tasks", "campaigns", order, control.id, "--json")
    return [json.loads(line) for line in said.splitlines()]


def show(client: Client, url: str, control: CampaignControl | None = None, **arguments: Any) -> SubmittedJob:
    job = Complete(prompt=[{"image": url}, "Hello"], max_new_tokens=3, **arguments)
    return client.submit(job, headers=control.headers if control else {})


def waiting(stood: Stand) -> int:
    """Jobs that wait for their time."""
    broker = stood.producer.server.connect()
    return sum(broker.zcard(name) for name in broker.scan_iter("idefics:due:*"))


def names(count: int) -> list[str]:
    return [uuid.uuid4().hex for _ in range(count)]


def test_a_pause_from_another_process_holds_jobs_back_and_a_resume_loses_none(
    stood: Stand, client: Client, control: CampaignControl
) -> None:
    running, queued = names(SLOTS), names(20)
    jobs = [show(client, stood.gallery.held(name), control) for name in running]
    jobs += [show(client, stood.gallery.picture(name), control) for name in queued]
    stood.gallery.await_requests(*running)
    assert steer(stood, "pause", control) == [{"id": control.id, "requested": True, "status": "running"}]
    time.sleep(EFFECT_S)
    stood.gallery.release(*running)
    # Jobs that run end; the others have gone back to wait for their time.
    assert [job.result(PATIENCE_S).text for job in jobs[:SLOTS]] == ["llo"] * SLOTS
    eventually(lambda: waiting(stood) == len(queued))
    assert set(stood.gallery.asked) & set(queued) == set()
    # They hold no place: another producer's jobs run.
    others = [show(client, stood.gallery.picture(name)) for name in names(2 * SLOTS)]
    assert {job.result(PATIENCE_S).text for job in others} == {"llo"}
    eventually(lambda: stood.producer.server.connect().hlen("unacked") == 0)
    # A run that finds the campaign still paused waits again, with no retry used up.
    time.sleep(1.5 * MIN_COUNTDOWN_S)
    assert set(stood.gallery.asked) & set(queued) == set()
    steer(stood, "resume", control)
    resumed = time.monotonic()
    assert {job.result(MAX_COUNTDOWN_S + PATIENCE_S).text for job in jobs[SLOTS:]} == {"llo"}
    assert time.monotonic() - resumed < MAX_COUNTDOWN_S + PATIENCE_S
    assert sorted(name for name in stood.gallery.asked if name in queued) == sorted(queued)


def test_a_worker_that_has_never_seen_a_campaign_holds_all_its_jobs_back(
    stood: Stand, client: Client, control: CampaignControl
) -> None:
    Campaigns(client.app).want(control.id, "paused")
    shown = names(2 * SLOTS)
    jobs = [show(client, stood.gallery.picture(name), control) for name in shown]
    eventually(lambda: waiting(stood) == len(jobs))
    assert set(stood.gallery.asked) & set(shown) == set()
    Campaigns(client.app).want(control.id, "canceled")
    for job in jobs:
        with pytest.raises(JobCanceled):
            job.result(MAX_COUNTDOWN_S + PATIENCE_S)


def test_a_paused_job_is_canceled_alone_and_its_deadline_counts_on(
    stood: Stand, client: Client, control: CampaignControl
) -> None:
    Campaigns(client.app).want(control.id, "paused")
    canceled, late = (show(client, stood.gallery.picture(name), control, deadline_s=4.0) for name in names(2))
    eventually(lambda: waiting(stood) == 2)
    canceled.cancel()
    with pytest.raises(JobCanceled):
        canceled.result(PATIENCE_S)
    with pytest.raises(JobError, match="its campaign was paused") as error:
        late.result(MAX_COUNTDOWN_S + PATIENCE_S)
    assert error.value.code == "deadline_exceeded"


def test_a_cancel_ends_running_and_waiting_jobs_and_no_others(
    stood: Stand, client: Client, control: CampaignControl
) -> None:
    other = CampaignControl(client.app, uuid.uuid4().hex)
    running = client.submit(ENDLESS, headers=control.headers)
    spared = client.submit(Complete(prompt=["Hello"] * 30, max_new_tokens=150), headers=other.headers)
    eventually(lambda: {running.status, spared.status} == {"processing"})
    loading = show(client, stood.gallery.held(uuid.uuid4().hex), control)
    queued = names(20)
    waiting_jobs = [show(client, stood.gallery.picture(name), control) for name in queued]
    time.sleep(0.2)
    steer(stood, "cancel", control)
    partial = _canceled(running).partial
    assert partial is not None
    assert len(partial.text) < 500
    for job in (loading, *waiting_jobs):
        _canceled(job)
    assert spared.result(PATIENCE_S).finish_reason == "length"
    # As after a cancellation of each job by its id, nothing is left.
    redis = stood.producer.server.connect
    eventually(lambda: redis().hlen("unacked") == 0)
    assert not redis(1).exists(*(CANCELLATION.named(job.id) for job in waiting_jobs))


def _canceled(job: SubmittedJob) -> JobCanceled:
    with pytest.raises(JobCanceled) as caught:
        job.result(PATIENCE_S)
    assert job.status == "canceled"
    return caught.value
