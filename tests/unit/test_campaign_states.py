"""What users want of campaigns, as a worker learns it: at most one read a second for each, none without a header."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest

from tasks.protocol import CAMPAIGN
from tasks.steering import READ_S, Wanted, campaign_of
from tests.support.waiting import SOON_S, eventually
from worker.queue.campaigns import (
    MAX_COUNTDOWN_S,
    MAX_KNOWN,
    MIN_COUNTDOWN_S,
    WATCH_S,
    CampaignStates,
    CampaignWatch,
    held_back_s,
    resent_after_s,
)
from worker.queue.due import DueJob

PAUSED = Wanted("paused", 5.0)


class Redis:
    """Has a value for each campaign, and remembers what was read."""

    def __init__(self) -> None:
        self.wanted: dict[str, Wanted] = {}
        self.read: list[str] = []
        self.is_away = False
        self.now = 100.0

    def __call__(self, campaigns: Sequence[str]) -> dict[str, Wanted]:
        self.read += campaigns
        if self.is_away:
            raise ConnectionError("refused")
        return {id: self.wanted.get(id, Wanted()) for id in campaigns}

    def states(self) -> CampaignStates:
        return CampaignStates(self, lambda: self.now)


@pytest.fixture
def redis() -> Redis:
    return Redis()


def test_a_campaign_is_read_once_a_second(redis: Redis) -> None:
    states = redis.states()
    assert [states.wanted("a").state for _ in range(9)] == ["running"] * 9
    redis.wanted["a"] = PAUSED
    redis.now += READ_S / 2
    assert states.wanted("a").state == "running"
    redis.now += READ_S / 2
    assert states.wanted("a") == PAUSED
    assert redis.read == ["a", "a"]


def test_threads_wait_for_the_first_reading_of_a_campaign() -> None:
    began, goes_on, found = threading.Event(), threading.Event(), []

    def slow(campaigns: Sequence[str]) -> dict[str, Wanted]:
        began.set()
        goes_on.wait(SOON_S)
        return {"a": PAUSED}

    states = CampaignStates(slow)
    threads = [threading.Thread(target=lambda: found.append(states.wanted("a"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert began.wait(SOON_S)
    time.sleep(0.05)
    assert found == []
    goes_on.set()
    for thread in threads:
        thread.join(SOON_S)
    assert found == [PAUSED] * 4


def test_without_an_answer_an_unknown_campaign_runs_and_a_paused_one_stays_paused(
    redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    states = redis.states()
    redis.wanted["known"] = PAUSED
    assert states.wanted("known") == PAUSED
    redis.is_away = True
    redis.now += READ_S
    assert (states.wanted("known"), states.wanted("unknown")) == (PAUSED, Wanted())
    assert caplog.text.count("cannot be read (refused)") == 1
    redis.is_away = False
    redis.now += READ_S
    redis.wanted["unknown"] = PAUSED
    assert states.wanted("unknown") == PAUSED


def test_any_number_of_campaigns_takes_bounded_memory(redis: Redis) -> None:
    states = redis.states()
    for number in range(3 * MAX_KNOWN):
        states.wanted(str(number))
    redis.wanted["0"] = PAUSED
    # It has been forgotten, and is read again.
    assert states.wanted("0") == PAUSED


@pytest.mark.parametrize(
    "value", [None, 7, "", "x" * 12, "0123456789ABCDEF", "../0123456789", "0123456789ab\n", ["a"], "0" * 10_000]
)
def test_a_header_of_another_form_names_no_campaign(value: object) -> None:
    assert campaign_of({CAMPAIGN: value}) is None
    assert campaign_of({}) is None


def test_a_countdown_grows_with_the_pause_within_its_bounds_and_is_spread() -> None:
    first, late = ([held_back_s(paused_s) for _ in range(200)] for paused_s in (0.0, 1e6))
    assert all(MIN_COUNTDOWN_S <= each <= 2 * MIN_COUNTDOWN_S for each in first)
    assert all(MAX_COUNTDOWN_S / 2 <= each <= MAX_COUNTDOWN_S for each in late)
    assert len({round(each, 3) for each in first}) > 100
    # A worker's clock may be behind the server's.
    assert held_back_s(-100.0) >= MIN_COUNTDOWN_S


# The parent


def test_the_parent_learns_what_is_wanted_without_waiting(redis: Redis) -> None:
    watch = CampaignWatch(redis, lambda: redis.now)
    redis.wanted["a"] = PAUSED
    assert watch.wanted("a") == Wanted()
    watch.start()

    def is_known() -> bool:
        watch.refresh()
        return watch.wanted("a") == PAUSED

    eventually(is_known)
    # A campaign without jobs is polled no longer.
    redis.now += WATCH_S
    watch.refresh()
    assert watch.wanted("a") == Wanted()


def test_jobs_are_freed_once_when_their_campaign_is_no_longer_paused(redis: Redis) -> None:
    watch = CampaignWatch(redis, lambda: redis.now)
    redis.wanted |= dict.fromkeys("abc", PAUSED)
    watch.start()

    def is_known() -> bool:
        watch.refresh()
        return {campaign: watch.wanted(campaign) for campaign in redis.wanted} == redis.wanted

    eventually(is_known)
    for campaign in "abcab":
        watch.remember(campaign, DueJob(campaign, "key", 7.0))
    assert watch.freed(9) == []
    redis.wanted |= {"a": Wanted(), "b": Wanted("canceled")}
    eventually(is_known)
    assert [job.id for job in watch.freed(3)] == ["a", "b", "a"]
    assert [job.id for job in watch.freed(3)] == ["b"]
    redis.wanted["c"] = Wanted()
    eventually(is_known)
    assert [job.id for job in watch.freed(3)] == ["c"]


def test_jobs_that_are_sent_again_come_back_when_the_parent_knows_their_campaign() -> None:
    soon = [resent_after_s(1e6, None) for _ in range(200)]
    assert all(READ_S <= each < MIN_COUNTDOWN_S for each in soon)
    assert resent_after_s(1e6, 60.0) > MIN_COUNTDOWN_S


def test_the_parent_polls_a_bounded_number_of_campaigns(redis: Redis) -> None:
    watch = CampaignWatch(redis, lambda: redis.now)
    for number in range(2 * MAX_KNOWN):
        watch.wanted(str(number))
    watch.refresh()
    watch.start()
    eventually(lambda: redis.read)
    assert len(redis.read) == MAX_KNOWN
