"""What the outcomes of a campaign's sample say about hosts and workers. Pure.

A result tells how long its last run loaded images, the wait for a free download of the host included, and how many runs
came before. Of a failed job the time is not known: it is that of its host's other downloads, or the whole timeout.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..outcomes import Outcome
from ..results import Result
from ..worker_status import DEFAULT_LIMITS, WorkerLimits
from .sample import OTHERS

#: Assumed seconds of a download if none of the sample succeeded.
DOWNLOAD_S = 0.25
#: The least share of the rows from which the workers' speed is read.
BUSY_SHARE = 0.6
#: Rows that end earlier than they would at an even speed, as a share of all, beyond which it is no chance.
UNEVEN = 0.1
#: Rows for each slot of a host that are enough to know its downloads.
ENOUGH_ROWS = 2
#: Seconds by which outcomes are seen later than they are told to have ended, beyond which clocks differ.
CLOCKS_S = 2.0
#: The mean of a retry's random delay, as a share of the longest.
MEAN_BACKOFF = 0.75


@dataclass(frozen=True, slots=True)
class Fleet:
    """The workers that a campaign's jobs go to."""

    workers: int = 1
    #: Simultaneous downloads from one host, and from all hosts, of all workers together.
    host_slots: int = DEFAULT_LIMITS.host_concurrency
    downloads: int = DEFAULT_LIMITS.image_jobs
    limits: WorkerLimits = DEFAULT_LIMITS

    def backoff_s(self, retries: int) -> float:
        """Mean seconds that a job waits between its runs."""
        return MEAN_BACKOFF * self.limits.retry_backoff_s * float(2**retries - 1)


@dataclass(frozen=True, slots=True)
class SampledJob:
    """A job of the sample that has ended."""

    #: Its group in the sample.
    host: str
    #: Unix seconds when it was sent, and when its outcome was seen.
    sent: float
    seen: float
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Observation:
    """What one row of the sample says."""

    host: str
    #: The error's code; None for an answer.
    code: str | None
    #: Seconds for which it used one of its host's downloads, in all its runs.
    download_s: float
    #: Seconds from its start to its end without waiting for others: downloads, retries' delays, the model.
    lasting_s: float
    #: Unix seconds of its end.
    ended: float
    is_retried: bool
    prompt_tokens: int = 0
    completion_tokens: int = 0
    #: Seconds in the engine.
    model_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Speed:
    """The rows a second that the workers run while they are busy."""

    rows_per_s: float
    #: Its relative standard error.
    error: float
    #: Whether jobs spend most of their time in the model.
    is_models: bool
    #: Unix seconds when the busy time ended.
    until: float


def observe(jobs: Sequence[SampledJob], fleet: Fleet) -> tuple[list[Observation], Speed]:
    """Each job's observation, in order, and the workers' speed."""
    jobs = _by_one_clock(jobs)
    answered = [job for job in jobs if isinstance(job.outcome, Result)]
    until = _busy_end([_ended(job) for job in jobs if not _is_retried(job)])
    downloads = dict(zip(map(id, answered), _downloads(answered, _slots(jobs, fleet), fleet, until), strict=True))
    by_host: defaultdict[str, list[float]] = defaultdict(list)
    for job in answered:
        by_host[job.host].append(downloads[id(job)])
    usual = {host: statistics.fmean(seconds) for host, seconds in by_host.items()}
    anywhere = statistics.median(downloads.values()) if downloads else DOWNLOAD_S
    failing = _failing_s(jobs, usual, anywhere, fleet)
    observations = [
        _of_answer(job, job.outcome, downloads[id(job)], failing.get(job.host, usual[job.host]), fleet)
        if isinstance(job.outcome, Result)
        else _of_failure(job, _failed_run_s(job, usual.get(job.host, anywhere), fleet), fleet)
        for job in jobs
    ]
    return observations, _speed(observations, until)


def _of_answer(job: SampledJob, result: Result, download_s: float, failing_s: float, fleet: Fleet) -> Observation:
    timing, retries = result.timing, result.timing.retries
    model_s = timing.wait_s + timing.generate_s
    slot_s = download_s + retries * failing_s
    return Observation(
        job.host, None, slot_s, slot_s + fleet.backoff_s(retries) + model_s, _ended(job), retries > 0,
        result.usage.prompt_tokens, result.usage.completion_tokens, model_s,
    )  # fmt: skip


def _of_failure(job: SampledJob, run_s: float, fleet: Fleet) -> Observation:
    retries = _retries(job, fleet)
    slot_s = run_s * (retries + 1)
    code = None if isinstance(job.outcome, Result) else job.outcome.code
    return Observation(job.host, code, slot_s, slot_s + fleet.backoff_s(retries), _ended(job), retries > 0)


def _failing_s(
    jobs: Sequence[SampledJob], usual: Mapping[str, float], anywhere: float, fleet: Fleet
) -> dict[str, float]:
    """Mean seconds of a run that ends with a temporary error, for hosts of which some are known."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for job in jobs:
        if not isinstance(job.outcome, Result) and _is_retried(job):
            found[job.host].append(_failed_run_s(job, usual.get(job.host, anywhere), fleet))
    return {host: statistics.fmean(seconds) for host, seconds in found.items()}


def _failed_run_s(job: SampledJob, usual_s: float, fleet: Fleet) -> float:
    return fleet.limits.image_timeout_s if job.outcome.detail == "timeout" else usual_s  # type: ignore[union-attr]


def _retries(job: SampledJob, fleet: Fleet) -> int:
    if isinstance(job.outcome, Result):
        return job.outcome.timing.retries
    return fleet.limits.max_retries if job.outcome.retryable else 0


def _is_retried(job: SampledJob) -> bool:
    if isinstance(job.outcome, Result):
        return job.outcome.timing.retries > 0
    return job.outcome.retryable


def _by_one_clock(jobs: Sequence[SampledJob]) -> Sequence[SampledJob]:
    """The jobs, with the producer's times moved to the workers' clock if that is another."""
    lags = [job.seen - _told_end(job, job.outcome) for job in jobs if isinstance(job.outcome, Result)]
    lag = statistics.median(lags) if lags else 0.0
    return jobs if abs(lag) <= CLOCKS_S else [replace(job, sent=job.sent + lag) for job in jobs]


def _started(job: SampledJob, result: Result) -> float:
    return job.sent + result.timing.queued_s


def _ended(job: SampledJob) -> float:
    """When a job ended: by its timing, which is more exact than when its outcome was seen."""
    if not isinstance(job.outcome, Result):
        return job.seen
    return min(job.seen, _told_end(job, job.outcome))


def _told_end(job: SampledJob, result: Result) -> float:
    timing = result.timing
    return _started(job, result) + timing.fetch_s + timing.wait_s + timing.generate_s


# Downloads


def _slots(jobs: Sequence[SampledJob], fleet: Fleet) -> dict[str, float]:
    """By host, the slots that its answers had: runs that failed, whose times are not known, used their part of them."""
    answers: Counter[str] = Counter(job.host for job in jobs if isinstance(job.outcome, Result))
    runs: Counter[str] = Counter()
    for job in jobs:
        runs[job.host] += 1 + _retries(job, fleet)
    slots = {host: fleet.host_slots * count / runs[host] for host, count in answers.items()}
    # Each of the smaller hosts has slots of its own.
    return {**slots, OTHERS: math.inf}


def _downloads(answered: Sequence[SampledJob], slots: Mapping[str, float], fleet: Fleet, until: float) -> list[float]:
    """Seconds that each answer's image used a download, without the wait for it: for its host's, or for any.

    While the workers are busy, downloads take longer than they do later, when the campaign only waits for a slow host.
    What is seen after `until` counts, if it is enough.
    """
    spans = [_span(job) for job in answered]
    seconds = used_s(spans, [job.host for job in answered], slots, fleet.downloads)
    by_host: defaultdict[str, list[int]] = defaultdict(list)
    for index, job in enumerate(answered):
        by_host[job.host].append(index)
    for host, indices in by_host.items():
        used = [seconds[index] for index in indices]
        late = [seconds[index] for index in indices if spans[index][0] > until]
        if host != OTHERS and len(late) >= ENOUGH_ROWS * fleet.host_slots and any(used):
            # The last rows seem longer than they are, since they share their slots with no later ones.
            ratio = min(1.0, statistics.fmean(late) / statistics.fmean(used))
            for index in indices:
                seconds[index] *= ratio
    return seconds


def _span(job: SampledJob) -> tuple[float, float]:
    assert isinstance(job.outcome, Result)  # nosec B101
    start = _started(job, job.outcome)
    return start, start + job.outcome.timing.fetch_s


def used_s(
    spans: Sequence[tuple[float, float]], hosts: Sequence[str], slots: Mapping[str, float], downloads: float
) -> list[float]:
    """Seconds of a download that each span used. Those beyond their host's slots, or beyond all downloads, share them
    or wait."""
    events = sorted((time, is_end, index) for index, span in enumerate(spans) for is_end, time in enumerate(span))
    running: Counter[str] = Counter()
    totals: defaultdict[str, float] = defaultdict(float)
    used, before = [0.0] * len(spans), 0.0
    for time, is_end, index in events:
        if time > before:
            loads = {host: min(count, slots[host]) for host, count in running.items()}
            share = min(1.0, downloads / max(1e-9, sum(loads.values())))
            for host, load in loads.items():
                totals[host] += (time - before) * share * load / running[host]
            before = time
        host = hosts[index]
        used[index] = totals[host] - used[index]
        running[host] += -1 if is_end else 1
        if not running[host]:
            del running[host]
    return used


# The workers' speed


def _busy_end(ended: Sequence[float]) -> float:
    times = sorted(ended)
    return times[_last_busy(times)] if times else 0.0


def _last_busy(times: Sequence[float]) -> int:
    """The last of the rows that ended while the workers were busy; `times` ascend.

    Afterwards fewer end, since some hosts' rows are still waited for: there the curve of ended rows bends. The part of
    the sample in which rows ended fastest would not do: it shows the speed that chance favored.
    """
    least = min(len(times) - 1, max(20, round(len(times) * BUSY_SHARE)))
    last = len(times) - 1
    while last > least:
        seconds = max(times[last] - times[0], 1e-9)
        early = {index: index / last - (times[index] - times[0]) / seconds for index in range(least, last)}
        bend = max(early, key=lambda index: early[index])
        if early[bend] < UNEVEN:
            break
        last = bend
    return last


def _speed(observations: Sequence[Observation], until: float, slices: int = 10) -> Speed:
    """The speed while the workers were busy, and its error by that of equal parts of this time."""
    times = sorted(each.ended for each in observations if not each.is_retried) or sorted(
        each.ended for each in observations
    )
    last = _last_busy(times)
    seconds = max(times[last] - times[0], 1e-3)
    marks = [times[last * part // slices] for part in range(slices + 1)]
    parts = [end - start for start, end in itertools.pairwise(marks)]
    error = statistics.pstdev(parts) / (statistics.fmean(parts) or 1.0) / slices**0.5
    answers = [each for each in observations if each.code is None]
    model_s, lasting_s = sum(each.model_s for each in answers), sum(each.lasting_s for each in answers)
    return Speed(max(1, last) / seconds, error, 2 * model_s > lasting_s, until)
