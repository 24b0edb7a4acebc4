"""One campaign, from its start to its ledgers."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.chaos.checker import Ledgers, Remains, read_ledgers
from benchmarks.chaos.faults import KINDS, Fault, schedule
from benchmarks.chaos.ledger import Ledger, Strike, now
from benchmarks.chaos.site import WORKERS, Site, await_true, open_site
from benchmarks.chaos.traffic import Producer, Receiver, plan

#: Seconds between two faults, on average. With fewer, jobs of low priority wait for minutes behind the backlog.
PAUSE_S = 7.0
#: Seconds for an affected worker to be ready again before the next fault.
READY_S = 15.0
#: Seconds without the end of a job after which the remaining ones count as lost.
SILENCE_S = 60.0
#: Seconds for the last messages to be acknowledged after the last job has ended.
SETTLE_S = 40.0
#: Seconds of waiting for an affected worker, on average.
AWAIT_S = 0.5
#: One job in this many is poison.
PER_POISON = 1_000


def run(
    jobs: int, faults: int, seed: int, folder: Path, pause_s: float = PAUSE_S, longest_s: float = math.inf
) -> Ledgers:
    """Send `jobs` jobs evenly while `faults` faults happen, and wait until all jobs have ended.

    Between two strikes are about `pause_s` seconds; none lasts longer than `longest_s`.
    """
    strikes = schedule(faults, WORKERS, seed, pause_s, longest_s)
    seconds = sum(fault.hold_s + fault.pause_s + AWAIT_S for fault in strikes)
    with open_site(folder) as site:
        producer = Producer(site, plan(jobs, max(1, jobs // PER_POISON), seed), per_s=jobs / seconds)
        receiver = Receiver(site, producer)
        producer.start()
        receiver.start()
        _strike(site, strikes, receiver)
        producer.join()
        _await_ends(jobs, receiver)
        remains = _await_nothing(site)
        receiver.close()
    return read_ledgers(folder, remains)


def _strike(site: Site, strikes: Sequence[Fault], receiver: Receiver) -> None:
    ledger = Ledger(site.folder / "strikes.jsonl")
    started = time.monotonic()
    for fault in strikes:
        time.sleep(fault.pause_s)
        if KINDS[fault.kind].is_of_a_worker and fault.awaits_ready:
            _await_ready(site, fault)
        say(f"{time.monotonic() - started:5.0f} s, {len(receiver.ended)} jobs ended: {fault.kind}, {fault.target}")
        ledger.write(Strike(now(), fault.kind, fault.target, fault.hold_s))
        KINDS[fault.kind].strike(site, fault)


def _await_ready(site: Site, fault: Fault) -> None:
    try:
        await_true(lambda: site.workers[fault.worker].is_ready, READY_S)
    except TimeoutError:
        say(f"worker-{fault.worker} is not ready after {READY_S:.0f} s: it is struck all the same")


def _await_ends(jobs: int, receiver: Receiver) -> None:
    ended, at = len(receiver.ended), time.monotonic()
    while len(receiver.ended) < jobs and time.monotonic() - at < SILENCE_S:
        time.sleep(0.5)
        if len(receiver.ended) > ended:
            ended, at = len(receiver.ended), time.monotonic()
    say(f"{len(receiver.ended)} of {jobs} jobs have ended")


def _await_nothing(site: Site) -> Remains:
    """What is left in Redis when it has come to rest."""
    end = time.monotonic() + SETTLE_S
    remains = site.remains()
    while not remains.is_nothing and time.monotonic() < end:
        time.sleep(0.5)
        remains = site.remains()
    return remains


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
