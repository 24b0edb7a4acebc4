"""Compares the ledgers: problems, and the figures of the campaign. Pure functions."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos.ledger import Accepted, Call, End, Step, Strike, read

#: After these steps a worker holds a job.
HELD = ("received", "started")


@dataclass(frozen=True, slots=True)
class Remains:
    """What is left in Redis: messages, and keys without a time to live."""

    queued: int = 0
    unacked: int = 0
    strays: tuple[str, ...] = ()

    @property
    def is_nothing(self) -> bool:
        return not (self.queued or self.unacked or self.strays)


@dataclass(frozen=True, slots=True)
class Ledgers:
    """Each in the order of its times."""

    accepted: Sequence[Accepted] = ()
    steps: Sequence[Step] = ()
    ends: Sequence[End] = ()
    calls: Sequence[Call] = ()
    strikes: Sequence[Strike] = ()
    remains: Remains = Remains()


def read_ledgers(folder: Path, remains: Remains) -> Ledgers:
    return Ledgers(
        read(folder / "producer.jsonl", Accepted),
        read(folder / "worker.jsonl", Step),
        read(folder / "receiver.jsonl", End),
        read(folder / "calls.jsonl", Call),
        read(folder / "strikes.jsonl", Strike),
        remains,
    )


def problems(ledgers: Ledgers) -> dict[str, list[str]]:
    """What must not be, by its name, with the jobs (or keys) concerned. Empty where the campaign is passed."""
    jobs = {job.id: job for job in ledgers.accepted}
    ends: dict[str, set[End]] = defaultdict(set)
    for end in ledgers.ends:
        ends[end.id].add(end)
    calls = Counter((call.what, call.id) for call in ledgers.calls)
    found = {
        "lost": [id for id in jobs if id not in ends],
        "ended twice": [id for id, read in ends.items() if len({(end.state, end.digest) for end in read}) > 1],
        "ended as it should not": [id for id, job in jobs.items() if any(_is_wrong(end, job) for end in ends[id])],
        "accepted twice": [id for id, times in Counter(job.id for job in ledgers.accepted).items() if times > 1],
        "ended, and never accepted": [id for id in ends if id not in jobs],
        "link not called": [id for id, job in jobs.items() if job.is_linked and not calls["link", id]],
        "errback called twice": [id for (what, id), times in calls.items() if what == "errback" and times > 1],
        "left in queues": ["messages"] * ledgers.remains.queued,
        "left unacknowledged": ["messages"] * ledgers.remains.unacked,
        "keys that stay for ever": list(ledgers.remains.strays),
    }
    return {name: ids for name, ids in found.items() if ids}


def _is_wrong(end: End, job: Accepted) -> bool:
    return (end.state, end.code) != (("FAILURE", "worker_lost") if job.is_poison else ("SUCCESS", ""))


def figures(ledgers: Ledgers) -> dict[str, Any]:
    """What the campaign measured."""
    starts = Counter(step.id for step in ledgers.steps if step.what == "started")
    spent = Counter(step.id for step in ledgers.steps if step.what in ("RETRY", "IGNORED"))
    successes = Counter(step.id for step in ledgers.steps if step.what == "SUCCESS")
    times = [job.at for job in ledgers.accepted] + list(_first_ends(ledgers).values())
    poisonous = {job.id for job in ledgers.accepted if job.is_poison}
    by_kind = defaultdict(list)
    for strike, seconds in recoveries(ledgers):
        by_kind[strike.kind].append(seconds)
    return {
        "jobs": len({job.id for job in ledgers.accepted}),
        "seconds": round(max(times) - min(times), 1) if times else 0.0,
        "faults": len(ledgers.strikes) + len(poisonous),
        "faults_by_kind": {
            "poison job": len(poisonous),
            **dict(sorted(Counter(strike.kind for strike in ledgers.strikes).items())),
        },
        "problems": {name: len(ids) for name, ids in problems(ledgers).items()},
        # Without those of poison jobs, which always do, and without retries.
        "jobs_run_again": sum(starts[id] - spent[id] > 1 for id in starts if id not in poisonous),
        "jobs_run_twice_to_their_end": sum(times > 1 for times in successes.values()),
        "links_called_twice": sum(times > 1 for times in Counter(c.id for c in ledgers.calls).values()),
        # From a strike's start until who was struck ends a job that began when it was over.
        "recovery_s": _summary(list(resumptions(ledgers))),
        # From a strike to the end of each job that it caught, with its wait behind others in the queue.
        "caught_jobs_s": _summary([seconds for each in by_kind.values() for seconds in each]),
        "caught_jobs_s_by_kind": {kind: _summary(each) for kind, each in sorted(by_kind.items())},
    }


def resumptions(ledgers: Ledgers) -> Iterator[float]:
    """For each strike, the seconds from its start until who was struck ends a job that began when it was over.

    What a struck worker's last breath ends, or what it takes up again when it is released, does not count. Of image
    servers, any worker's next job that shows an image.
    """
    jobs = {job.id: job for job in ledgers.accepted}
    for strike in ledgers.strikes:
        begun = set()
        for step in ledgers.steps[bisect_left(ledgers.steps, strike.at + strike.hold_s, key=lambda step: step.at) :]:
            run = step.worker, step.id
            if step.what == "started" and _bears(strike, step.worker, jobs[step.id]):
                begun.add(run)
            elif step.what == "SUCCESS" and run in begun:
                yield step.at - strike.at
                break


def recoveries(ledgers: Ledgers) -> Iterator[tuple[Strike, float]]:
    """For each strike and each job that it caught, the seconds from the strike to the job's end.

    Caught is a job that a struck worker held, running or waiting, when it was struck, or took while the strike lasted;
    of image servers, a job that shows an image. For a job that was not yet due, or not yet taken, the seconds count
    from when it was. One that is caught again counts for each strike. Poison jobs do not recover.
    """
    jobs = {job.id: job for job in ledgers.accepted if not job.is_poison}
    ended = _first_ends(ledgers)
    for strike in ledgers.strikes:
        for id, since in _caught(strike, ledgers.steps, jobs, ended).items():
            due = jobs[id].at + jobs[id].countdown
            seconds = ended[id] - max(strike.at, since, due)
            if seconds > 0:
                yield strike, seconds


def _first_ends(ledgers: Ledgers) -> dict[str, float]:
    return {end.id: end.at for end in reversed(ledgers.ends)}


def _caught(
    strike: Strike, steps: Sequence[Step], jobs: dict[str, Accepted], ended: dict[str, float]
) -> dict[str, float]:
    """The jobs that a strike caught, with the times at which they were taken."""
    first_after = bisect_left(steps, strike.at, key=lambda step: step.at)
    held: dict[tuple[str, str], float] = {}
    for step in steps[:first_after]:
        if step.what == "born":
            held = {key: at for key, at in held.items() if key[0] != step.worker}
        elif step.what in HELD:
            held[step.worker, step.id] = step.at
        else:
            held.pop((step.worker, step.id), None)
    for step in steps[first_after:]:
        if step.at > strike.at + strike.hold_s:
            break
        if step.what in HELD:
            held.setdefault((step.worker, step.id), step.at)
    return {
        id: at
        for (worker, id), at in held.items()
        if id in jobs and ended.get(id, 0.0) > strike.at and _bears(strike, worker, jobs[id])
    }


def _bears(strike: Strike, worker: str, job: Accepted) -> bool:
    if strike.target == "pictures":
        return job.is_pictured
    return strike.target in ("all", worker)


def _summary(seconds: Sequence[float]) -> dict[str, float]:
    return {"count": len(seconds), "p50": _percentile(seconds, 50), "p99": _percentile(seconds, 99)} | (
        {"max": round(max(seconds), 2)} if seconds else {}
    )


def _percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that this percentage of the values does not exceed."""
    if not values:
        return 0.0
    return round(sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)], 2)
