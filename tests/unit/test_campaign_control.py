"""A campaign's control record in a real Redis: what its producer reports is seen, and what users want reaches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from celery import Celery

from tasks.apps import app_at
from tasks.campaign import control as controls
from tasks.campaign.control import REPORT_S, TROUBLE_PAUSE_S, CampaignControl
from tasks.campaign.directory import Campaigns
from tasks.campaign.record import (
    MAX_CAMPAIGNS,
    SILENT_S,
    TTL_S,
    CampaignInfo,
    CampaignProgress,
    CampaignRecord,
    base_name,
    public_id,
    record,
)
from tasks.errors import NotFound
from tasks.protocol import CAMPAIGN
from tasks.redis_keys import CAMPAIGN_ABOUT, CAMPAIGN_INDEX, CAMPAIGN_WANTED
from tasks.steering import READ_S, Wanted
from worker.demo.stack import Broker

ID = "0d6a0f0e5c1e4b0fa3a7f7c1c9f3a001"
INFO = CampaignInfo("shoes", "idefics.caption", "shoes.csv", "captions.parquet", "machine-1", 1_000.0)
PROGRESS = CampaignProgress(
    rows=1_000, done=40, failed=3, failures={"image_unreachable": 2, "image_invalid": 1}, in_flight=100, rate=12.5,
    bound="hosts", left_s=76.8,
)  # fmt: skip


class Clock:
    """Seconds that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def control(app: Celery, clock: Clock) -> CampaignControl:
    return CampaignControl(app, ID, clock)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds: list[float] = []
    monkeypatch.setattr(controls.time, "sleep", seconds.append)
    return seconds


def only(app: Celery) -> CampaignRecord:
    (found,) = Campaigns(app).all()
    return found


# The record


def test_others_see_what_a_campaign_reports(app: Celery, control: CampaignControl) -> None:
    control.register(INFO)
    control.report(PROGRESS)
    seen = only(app)
    assert (seen.info, seen.progress, seen.status) == (INFO, PROGRESS, "running")
    assert seen.id == public_id(ID) == control.headers[CAMPAIGN]
    assert seen.age_s < 60


def test_a_campaigns_own_id_is_not_in_redis(server: Broker, control: CampaignControl) -> None:
    control.register(INFO)
    control.report(PROGRESS)
    redis = server.connect()
    assert ID not in str([redis.hgetall(CAMPAIGN_ABOUT.named(control.id)), redis.keys()])


def test_reports_are_written_every_few_seconds_at_most(app: Celery, control: CampaignControl, clock: Clock) -> None:
    control.register(INFO)
    control.report(PROGRESS)
    clock.now += REPORT_S / 2
    control.report(replace(PROGRESS, done=41))
    assert only(app).progress.done == 40
    clock.now += REPORT_S
    control.report(replace(PROGRESS, done=42))
    assert only(app).progress.done == 42


@pytest.mark.parametrize("how", ["finished", "stopped", "canceled"])
def test_the_end_is_reported_at_once_and_another_start_runs_again(
    app: Celery, control: CampaignControl, how: str
) -> None:
    control.register(INFO)
    control.report(PROGRESS)
    control.end(how, replace(PROGRESS, done=1_000, left_s=None))  # type: ignore[arg-type]
    assert (only(app).status, only(app).progress.done, only(app).progress.left_s) == (how, 1_000, None)
    control.register(INFO)
    assert only(app).status == "running"


def test_every_key_expires_and_a_report_renews_it(app: Celery, server: Broker, control: CampaignControl) -> None:
    control.register(INFO)
    Campaigns(app).want(control.id, "paused")
    redis = server.connect()
    keys = [CAMPAIGN_ABOUT.named(control.id), CAMPAIGN_WANTED.named(control.id), CAMPAIGN_INDEX.named()]
    assert {key.decode() for key in redis.scan_iter()} == set(keys)
    for key in keys:
        assert redis.ttl(key) > TTL_S - 60
        redis.expire(key, 100)
    control.report(PROGRESS)
    assert all(redis.ttl(key) > TTL_S - 60 for key in keys)


def test_the_index_keeps_the_newest_campaigns(app: Celery, server: Broker, control: CampaignControl) -> None:
    redis = server.connect()
    redis.zadd(CAMPAIGN_INDEX.named(), {f"old-{number}": number for number in range(MAX_CAMPAIGNS)})
    control.register(INFO)
    assert redis.zcard(CAMPAIGN_INDEX.named()) == MAX_CAMPAIGNS
    # Those without a record any more are not shown.
    assert only(app).id == control.id


def test_a_silent_producers_campaign_is_seen_as_such() -> None:
    found = {b"seen": b"1000"}
    assert record("a", found, Wanted(), 1000 + SILENT_S - 1).status == "running"
    assert record("a", found, Wanted(), 1000 + SILENT_S + 1).status == "silent"
    assert record("a", found, Wanted("paused"), 1000 + SILENT_S + 1).status == "paused"


@pytest.mark.parametrize("value", [b"", b"\xff", b"nan", b"inf", b"[1]", b"{", b'{"a": "b"}', b"1e999", b"[" * 9_999])
def test_a_record_in_another_form_is_read_with_defaults(value: bytes) -> None:
    names = ("name", "started", "rows", "done", "failed", "failures", "rate", "left_s", "seen", "ended")
    found = record("a", {name.encode(): value for name in names}, Wanted.read(value), 0.0)
    assert (found.progress.rows, found.progress.done, found.progress.left_s) == (None, 0, None)
    assert (found.progress.failures, found.ended, found.wanted) == ({}, "", Wanted())


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("shoes.csv", "shoes.csv"),
        ("/home/me/secret/shoes.csv", "shoes.csv"),
        ("pictures/", "pictures"),
        (r"C:\data\shoes.csv", "shoes.csv"),
        ("s3://key:secret@bucket/nightly/shoes.parquet?sig=abc", "shoes.parquet"),
        ("s3://key:secret@bucket", "bucket"),
    ],
)
def test_a_record_has_base_names_without_credentials(path: str, name: str) -> None:
    assert base_name(path) == name


# What users want


def test_a_producer_learns_what_users_want_within_a_second(app: Celery, control: CampaignControl, clock: Clock) -> None:
    control.register(INFO)
    assert control.state() == "running"
    for wanted in ("paused", "running", "canceled"):
        Campaigns(app).want(control.id, wanted)  # type: ignore[arg-type]
        before = control.state()
        clock.now += READ_S
        assert control.state() == wanted != before


def test_a_paused_campaign_stays_paused_when_its_producer_starts_again(
    app: Celery, control: CampaignControl, slept: list[float]
) -> None:
    control.register(INFO)
    Campaigns(app).want(control.id, "paused")
    control.register(INFO)
    assert (control.state(), slept) == ("paused", [])


def test_a_canceled_campaign_that_is_started_again_runs_once_no_worker_has_the_earlier_state(
    app: Celery, control: CampaignControl, slept: list[float]
) -> None:
    control.register(INFO)
    Campaigns(app).want(control.id, "canceled")
    control.register(INFO)
    assert (control.state(), slept) == ("running", [2 * READ_S])


def test_two_deployments_with_prefixes_share_no_campaign(server: Broker, app: Celery, control: CampaignControl) -> None:
    control.register(INFO)
    other = app_at(server.url, None)
    other.conf.broker_transport_options = {**other.conf.broker_transport_options, "global_keyprefix": "other:"}
    assert Campaigns(other).all() == []


# Redis does not answer


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "memory://"])
def test_a_campaign_goes_on_without_its_record_and_says_why(url: str, clock: Clock) -> None:
    control = CampaignControl(Celery(broker=url), ID, clock)
    control.register(INFO)
    control.report(PROGRESS)
    assert control.state() == "running"
    control.end("finished", PROGRESS)
    assert control.trouble.startswith("Others cannot see or steer this campaign: ")


def test_what_was_wanted_last_holds_while_redis_does_not_answer(
    app: Celery, control: CampaignControl, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    control.register(INFO)
    Campaigns(app).want(control.id, "paused")
    assert control.state() == "paused"
    Campaigns(app).want(control.id, "running")
    clock.now += READ_S
    with monkeypatch.context() as patched:
        patched.setattr(controls, "read_wanted", _away)
        assert control.state() == "paused"
    assert control.trouble
    clock.now += TROUBLE_PAUSE_S
    assert control.state() == "running"
    assert control.trouble == ""


def _away(*_: object) -> None:
    raise ConnectionError("refused")


# Finding one


@pytest.fixture
def three(app: Celery, slept: list[float]) -> Callable[[str], CampaignRecord]:
    for id, name in (("one", "shoes"), ("two", "hats"), ("three", "shoes")):
        CampaignControl(app, id).register(replace(INFO, name=name))
    return Campaigns(app).get


def test_a_campaign_is_found_by_its_id_its_ids_beginning_or_its_name(three: Callable[[str], CampaignRecord]) -> None:
    id = public_id("two")
    assert {three(asked).id for asked in (id, id[:8], "hats")} == {id}
    assert three("shoes").id == public_id("three")


@pytest.mark.parametrize("asked", ["", "unknown"])
def test_an_unknown_campaign_is_not_found(three: Callable[[str], CampaignRecord], asked: str) -> None:
    with pytest.raises(NotFound, match="campaigns ls"):
        three(asked)


def test_an_ids_beginning_that_fits_several_is_refused(app: Celery) -> None:
    first = {public_id(str(number))[0]: str(number) for number in range(40)}
    twice = next(str(n) for n in range(40) if first[public_id(str(n))[0]] != str(n))
    for id in (twice, first[public_id(twice)[0]]):
        CampaignControl(app, id).register(INFO)
    with pytest.raises(NotFound, match="2 campaigns"):
        Campaigns(app).get(public_id(twice)[0])
