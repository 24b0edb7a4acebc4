"""Our worker compared with the alternatives that a user has, alternately on one machine. `make bench`.

Every round gives each contender the same number of new jobs; figures are medians over rounds, ratios are of the same
round. All texts must be equal to the first contender's, or the comparison fails. Contenders start anew for each
workload: their first round, the cold start, is reported apart.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import CHECKPOINTS
from benchmarks.contenders import STARTS, Contender, Turn, contenders
from benchmarks.measures import RESULTS
from benchmarks.pictures import PICTURES, PictureBook
from benchmarks.workloads import WORKLOADS, Workload

THREADS = 1


def measure(everybody: Sequence[Contender], workload: Workload, book: PictureBook, jobs: int, rounds: int) -> Any:
    """One workload's figures."""
    jobs = math.ceil(jobs * workload.part)
    turns: dict[str, list[Turn]] = {contender.name: [] for contender in everybody}
    for number in range(rounds + 1):
        batch = workload.make(jobs, book)
        this = {contender.name: contender.run(batch) for contender in everybody}
        _check_texts(workload, this)
        for name, turn in this.items():
            turns[name].append(turn)
        print(
            f"{workload.name} {number}: " + ", ".join(f"{n} {jobs / t.seconds:.1f}/s" for n, t in this.items()),
            flush=True,
        )
    cold = _figures({name: each[:1] for name, each in turns.items()}, jobs)
    steady = _figures({name: each[1:] for name, each in turns.items()}, jobs)
    return {name: {**steady[name], "cold": cold[name]} for name in turns}


def _check_texts(workload: Workload, turns: dict[str, Turn]) -> None:
    first, *others = turns.items()
    for name, turn in others if workload.compares_texts else ():
        differing = sum(a.strip() != b.strip() for a, b in zip(first[1].texts, turn.texts, strict=True))
        if differing:
            raise RuntimeError(f"{name} and {first[0]} differ in {differing} texts of {workload.name}: no comparison.")


def _figures(turns: dict[str, list[Turn]], jobs: int) -> dict[str, Any]:
    ours = turns["idefics-jobs"]
    return {
        name: {
            "jobs_per_s": round(statistics.median(jobs / turn.seconds for turn in each), 2),
            "cpu_ms_per_job": round(statistics.median(1000 * turn.cpu_s / jobs for turn in each), 2),
            "busy_cores": round(statistics.median(turn.cpu_s / turn.seconds for turn in each), 2),
            "ours_to_this": [round(turn.seconds / our.seconds, 2) for turn, our in zip(each, ours, strict=True)],
            "ours_to_this_median": round(
                statistics.median(turn.seconds / our.seconds for turn, our in zip(each, ours, strict=True)), 2
            ),
        }
        for name, each in turns.items()
    }


def run(
    names: Sequence[str], workloads: Sequence[str], checkpoint: str, pictures: str, jobs: int, rounds: int
) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        chosen = CHECKPOINTS[checkpoint]
        book, model = PICTURES[pictures](root, chosen.picture_size), chosen.make(root)
        for name in workloads:
            with contenders(names, model, root, THREADS) as everybody:
                figures[name] = measure(everybody, WORKLOADS[name], book, jobs, rounds)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {THREADS} torch thread",
        "checkpoint": checkpoint,
        "pictures": pictures,
        "jobs_per_round": jobs,
        "rounds": rounds,
        "workloads": figures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contenders", nargs="+", choices=STARTS, default=["stock", "naive", "litserve", "ours"])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--checkpoint", choices=CHECKPOINTS, default="shipped")
    parser.add_argument("--pictures", choices=PICTURES, default="drawn")
    parser.add_argument("--jobs", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", help="the name of the file in results/")
    asked = parser.parse_args()
    figures = run(asked.contenders, asked.workloads, asked.checkpoint, asked.pictures, asked.jobs, asked.rounds)
    print(json.dumps(figures, indent=2))
    if asked.save:
        (RESULTS / f"{asked.save}.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
