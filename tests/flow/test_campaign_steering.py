"""Workers hold back the jobs of a paused campaign and end those of a canceled one, whoever says so from wherever."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tasks import Client, Complete, JobCanceled, JobError, SubmittedJob
from tasks.campaign.control import CampaignControl, CampaignInfo
from tasks.campaign.directory import Campaigns
from tasks.cli import main
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
    """A worker whose jobs have no retry to use up, and which asks for each picture again."""
    log = tmp_path_factory.mktemp("campaigns") / "log"
    with (
        Gallery().open() as gallery,
        stack.broker() as server,
        stand(server, gallery, log, MAX_RETRIES="0", IMAGE_CACHE_BYTES="0") as stood,
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


def steer(stood: Stand, order: str, campaign: str) -> list[dict[str, Any]]:
    """Give an order from another process."""
    said = command(stood.producer.server, "tasks", "campaigns", order, campaign, "--json")
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
    assert steer(stood, "pause", control.id) == [{"id": control.id, "requested": True, "status": "running"}]
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
    steer(stood, "resume", control.id)
    assert {job.result(MAX_COUNTDOWN_S + PATIENCE_S).text for job in jobs[SLOTS:]} == {"llo"}
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
    steer(stood, "cancel", control.id)
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


# `idefics-jobs run`


def write_table(stood: Stand, folder: Path, rows: Sequence[str]) -> None:
    table = "".join(f"{name},{stood.gallery.picture(name)}\n" for name in rows)
    (folder / "in.csv").write_text(f"sku,image\n{table}")


def start(stood: Stand, folder: Path) -> subprocess.Popen[str]:
    """Run the table in a process of its own, as a campaign with the folder's name."""
    server = stood.producer.server
    words = ["run", str(folder / "in.csv"), str(folder / "out.csv"), "--task", "caption", "--image", "image"]
    words += ["--set", "max_new_tokens=10", "--window", "40", "--name", folder.name]
    environment = {**os.environ, "IDEFICS_BROKER_URL": server.url, "IDEFICS_RESULT_BACKEND": server.results}
    return subprocess.Popen(
        [sys.executable, "-m", "tasks", *words], cwd=stack.CHECKOUT, env=environment, text=True, stderr=subprocess.PIPE
    )


def order(stood: Stand, order: str, campaign: str) -> None:
    """Give an order from this process, at once: the campaign must not end before."""
    done = CliRunner().invoke(main, ["--broker", stood.producer.server.url, "campaigns", order, campaign])
    assert done.exit_code == 0, done.output


def codes(folder: Path) -> dict[str, str]:
    """The output's error codes by row, in its order."""
    with (folder / "out.csv").open(newline="") as file:
        return {row["sku"]: row["error_code"] for row in csv.DictReader(file)}


def asked(stood: Stand, rows: Sequence[str]) -> list[str]:
    return [name for name in stood.gallery.asked if name in rows]


def test_a_command_is_paused_and_goes_on_from_another_process(stood: Stand, client: Client, tmp_path: Path) -> None:
    rows = names(160)
    write_table(stood, tmp_path, rows)
    with start(stood, tmp_path) as process:
        eventually(lambda: len(asked(stood, rows)) > 2 * SLOTS)
        order(stood, "pause", tmp_path.name)
        paused = time.monotonic()
        eventually(lambda: time.monotonic() - stood.gallery.asked_at > 2 * EFFECT_S)
        assert len(asked(stood, rows)) < len(rows)
        # Generous, for a busy machine.
        assert stood.gallery.asked_at - paused < 5 * EFFECT_S
        assert Campaigns(client.app).get(tmp_path.name).status == "paused"
        assert process.poll() is None
        order(stood, "resume", tmp_path.name)
        told = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 0, told
    assert list(codes(tmp_path).items()) == [(name, "") for name in rows]
    assert sorted(asked(stood, rows)) == sorted(rows)


def test_a_canceled_command_ends_and_the_same_command_sends_what_is_missing(stood: Stand, tmp_path: Path) -> None:
    rows = names(160)
    write_table(stood, tmp_path, rows)
    with start(stood, tmp_path) as process:
        eventually(lambda: len(asked(stood, rows)) > 3 * SLOTS)
        order(stood, "cancel", tmp_path.name)
        told = process.communicate(timeout=PATIENCE_S)[1].splitlines()
    assert process.returncode == 3, told
    assert told[-1].endswith("It was canceled: run the same command to go on.")
    found = codes(tmp_path)
    assert list(found) == rows
    assert set(found.values()) - {"not_run"} == {"", "canceled"}

    missing = [name for name, code in found.items() if code]
    before = len(stood.gallery.asked)
    with start(stood, tmp_path) as process:
        told = process.communicate(timeout=PATIENCE_S)[1].splitlines()
    assert process.returncode == 0, told
    assert list(codes(tmp_path).items()) == [(name, "") for name in rows]
    assert sorted(stood.gallery.asked[before:]) == sorted(missing)
