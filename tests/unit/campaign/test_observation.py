"""What a sample's outcomes say about downloads and about the workers' speed."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Iterable, Sequence

import pytest

from tasks.campaign.observation import Fleet, SampledJob, observe, used_s
from tasks.campaign.sample import OTHERS
from tasks.errors import ImageInvalid, ImageUnreachable, JobError
from tasks.results import Result, Timing, Usage
from tests.support.campaign_simulation import MODEL

FLEET = Fleet()


def answered(
    sent: float, queued: float, fetch: float, *, host: str = "a", retries: int = 0, model: float = 0.0, lag: float = 0.1
) -> SampledJob:
    timing = Timing(queued_s=queued, fetch_s=fetch, wait_s=0.0, generate_s=model, retries=retries)
    usage = Usage(prompt_tokens=3, completion_tokens=2, images=1)
    result = Result(text="", finish_reason="stop", usage=usage, model=MODEL, timing=timing)
    return SampledJob(host, sent, sent + queued + fetch + model + lag, result)


def failed(seen: float, error: JobError, host: str = "a") -> SampledJob:
    return SampledJob(host, 0.0, seen, error)


def used(spans: Sequence[tuple[float, float]], slots: int) -> list[float]:
    return used_s(spans, ["a"] * len(spans), {"a": slots}, downloads=64)


def test_spans_beyond_the_slots_share_them() -> None:
    assert used([(0, 1), (0, 1), (0, 1), (0, 1)], slots=2) == pytest.approx([0.5] * 4)
    assert used([(0, 2), (5, 6)], slots=1) == pytest.approx([2, 1])
    assert used([(0, 4), (0, 2)], slots=1) == pytest.approx([3, 1])
    assert used([], slots=1) == []
    assert used([(3, 3)], slots=1) == [0]


def test_spans_beyond_all_downloads_share_them_among_hosts() -> None:
    spans = [(0.0, 1.0)] * 4
    assert used_s(spans, list("abcd"), dict.fromkeys("abcd", 8), downloads=2) == pytest.approx([0.5] * 4)
    # Host a has one slot, so its two spans count as one.
    spans.append((0.0, 2.0))
    found = used_s(spans, list("aabcd"), dict.fromkeys("abcd", 1), downloads=2)
    assert found == pytest.approx([0.25, 0.25, 0.5, 0.5, 1.5])


def test_runs_that_failed_had_their_part_of_the_slots() -> None:
    # One slot, in which each answer's run came after one that failed: half of the time is theirs.
    jobs = [answered(0, 0.0, 1.0 + number, retries=1) for number in range(8)]
    seen, _ = observe(jobs, Fleet(host_slots=1))
    assert sum(each.download_s for each in seen) == pytest.approx(8.0)


def test_the_wait_for_a_download_is_no_part_of_it() -> None:
    # 80 rows at once, 8 at a time, of half a second each: the last ones waited.
    jobs = [answered(0, 0.0, 0.5 * (1 + number // 8)) for number in range(16)]
    seen, _ = observe(jobs, FLEET)
    assert sum(each.download_s for each in seen) == pytest.approx(16 * 0.5, rel=0.01)


def test_smaller_hosts_together_have_many_slots() -> None:
    seen, _ = observe([answered(0, 0.0, 1.0, host=OTHERS) for _ in range(40)], FLEET)
    assert {each.download_s for each in seen} == {1.0}


def test_an_answer_after_retries_counts_its_earlier_runs() -> None:
    (seen,), _ = observe([answered(0, 9.0, 1.0, retries=2)], FLEET)
    assert seen.download_s == pytest.approx(3.0)
    assert seen.lasting_s == pytest.approx(3.0 + 0.75 * 2 * 3)
    assert seen.is_retried


def test_a_timeout_costs_all_its_retries() -> None:
    gone = failed(95, ImageUnreachable("It did not answer.", detail="timeout"), "dead")
    (_, seen), _ = observe([answered(0, 0, 0.2), gone], FLEET)
    assert (seen.code, seen.download_s) == ("image_unreachable", 4 * 20.0)
    assert seen.lasting_s == pytest.approx(80 + 0.75 * 2 * 7)


def test_a_quick_failure_takes_as_long_as_its_hosts_downloads() -> None:
    jobs = [answered(0, 0, 0.2), answered(0, 0, 0.2, host="b"), failed(0.3, ImageInvalid("None.", detail="http_404"))]
    jobs.append(failed(12, ImageUnreachable("Busy.", detail="http_503"), "unknown"))
    (_, _, missing, busy), _ = observe(jobs, FLEET)
    assert missing.download_s == pytest.approx(0.2)
    assert busy.download_s == pytest.approx(4 * 0.2)


def at(times: Iterable[float]) -> list[SampledJob]:
    """Jobs that ended at these times, at once after they were sent."""
    return [answered(time, 0.0, 0.0) for time in times]


def test_the_speed_is_that_of_the_time_before_slow_hosts_alone_are_waited_for() -> None:
    busy = [number / 100 for number in range(400)]
    _, speed = observe(at([*busy, *(4 + number / 10 for number in range(80)), *map(float, range(12, 32))]), FLEET)
    assert speed.rows_per_s == pytest.approx(100, rel=0.02)
    assert speed.error < 0.05
    assert speed.until == pytest.approx(4, abs=0.2)


def test_workers_that_are_fast_by_chance_for_a_while_are_not_taken_for_faster() -> None:
    speeds = []
    for seed in range(30):
        chance = random.Random(seed)
        # Rows end in bursts, 100 a second in the mean.
        times = itertools.accumulate(chance.gammavariate(0.2, 0.05) for _ in range(500))
        speeds.append(observe(at(times), FLEET)[1].rows_per_s)
    assert statistics.fmean(speeds) == pytest.approx(100, rel=0.06)


def test_what_jobs_spend_their_time_in_names_the_bound() -> None:
    assert observe([answered(0, 0, 0.1, model=2.0)], FLEET)[1].is_models
    assert not observe([answered(0, 0, 2.0, model=0.1)], FLEET)[1].is_models


def test_a_worker_with_another_clock_is_understood() -> None:
    # Its clock is a minute ahead: each job seems to have waited for a minute.
    jobs = [answered(number / 100, 60.0, 0.5, lag=-59.9) for number in range(200)]
    seen, speed = observe(jobs, FLEET)
    assert speed.rows_per_s == pytest.approx(100, rel=0.05)
    assert all(0 < each.ended < 4 for each in seen)


def test_one_job_is_enough() -> None:
    (seen,), speed = observe([failed(1.0, ImageInvalid("None.", detail="http_404"))], FLEET)
    assert seen.code == "image_invalid"
    assert speed.rows_per_s > 0
