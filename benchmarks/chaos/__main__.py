"""`make chaos`: runs a campaign and prints its figures; the exit status is 1 if a job was lost or ended twice."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.chaos.campaign import PAUSE_S, run, say
from benchmarks.chaos.checker import figures, problems

RESULTS = Path(__file__).parents[1] / "results" / "chaos.json"
#: Jobs that are named for each problem.
NAMED = 10


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--faults", type=int, default=85, help="without the poison jobs")
    parser.add_argument("--pause", type=float, default=PAUSE_S, help="seconds between two faults, on average")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", action="store_true", help=f"write the figures to {RESULTS.name}")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="idefics-chaos-"))
    say(f"Ledgers and logs: {folder}")
    ledgers = run(asked.jobs, asked.faults, asked.seed, folder, asked.pause)
    found = {"seed": asked.seed, "pause_s": asked.pause, **figures(ledgers)}
    say(json.dumps(found, indent=2))
    wrong = problems(ledgers)
    for name, ids in wrong.items():
        say(f"{name}: {len(ids)}, as {', '.join(ids[:NAMED])}")
    if asked.save and not wrong:
        RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
