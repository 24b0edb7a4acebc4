"""A campaign over a large CSV whose producer is killed: `python -m benchmarks.campaign [--save campaign]`.

A real broker and a real worker, with a fake model that does nothing. The producer is killed with SIGKILL at random
moments, and started again with the same command. At the end each row of the input must stand in the output once, in the
input's order, with its own answer. Also measured: the producer's memory over time, which must stay flat.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.measures import RESULTS
from tasks.campaign.errors import CampaignError
from tasks.campaign.state import CampaignState
from tasks.job_window import WINDOW
from worker.demo import stack

ROWS, KILLS = 1_000_000, 5
#: Seconds between two looks at the producer's memory and at the state.
LOOK_S = 0.1
#: The shares of sent rows between which kills come.
FIRST_KILL, LAST_KILL = 0.02, 0.98
#: The fake model answers with the last characters of what it is asked.
DIGITS = 8
PLAN = ["--task", "complete", "--id", "id", "--set", 'prompt=["{ask}"]', "--set", f"max_new_tokens={DIGITS}"]


@dataclass
class Observed:
    """What was seen while the producer ran."""

    #: MiB of the producer, with the share of rows that were sent.
    memory: list[tuple[float, float]] = field(default_factory=list)
    #: Seconds from each restart after a kill to the next new answer.
    resumed_s: list[float] = field(default_factory=list)
    #: Processor time of the producer, its starts and restarts included.
    cpu_s: float = 0.0
    kills: int = 0


def campaign(
    folder: Path, server: stack.Broker, rows: int, kills: int, *, seed: int = 0, window: int = WINDOW
) -> dict[str, Any]:
    """Run a campaign to its end, with kills, and check its output."""
    write_input(folder / "in.csv", rows)
    chance = random.Random(seed)
    moments = sorted(chance.uniform(FIRST_KILL, LAST_KILL) for _ in range(kills))
    observed, began = Observed(), time.monotonic()
    for moment in [*moments, None]:
        _produce(folder, server, rows, moment, window, observed)
    seconds = time.monotonic() - began
    return {
        "rows": rows,
        "kills": observed.kills,
        "seconds": round(seconds, 1),
        "rows_per_s": round(rows / seconds),
        "producer_cpu_ms_per_row": round(1_000 * observed.cpu_s / rows, 2),
        **wrong(folder / "out.csv", rows),
        "results_left_in_redis": sum(1 for _ in server.connect(1).scan_iter("celery-task-meta-*", count=1_000)),
        "resumed_s": [round(each, 2) for each in observed.resumed_s],
        "peak_memory_mib": round(max(mib for _, mib in observed.memory)),
        "memory_mib_by_quarter": quarters(observed.memory),
    }


def write_input(path: Path, rows: int) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "ask"])
        table.writerows([f"r{number}", f"Hello {number:0{DIGITS}}"] for number in range(rows))


def wrong(path: Path, rows: int) -> dict[str, int]:
    """The numbers of rows of an output that are missing, stand there twice, out of order, or with another answer."""
    seen, twice, disordered, other, last = bytearray(rows), 0, 0, 0, -1
    for id, text in _answers(path):
        number = int(id.removeprefix("r"))
        twice += seen[number]
        seen[number] = 1
        disordered += number <= last
        other += text != f"{number:0{DIGITS}}"
        last = number
    return {"missing": seen.count(0), "twice": twice, "out_of_order": disordered, "other_answer": other}


def _answers(path: Path) -> Iterator[tuple[str, str]]:
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            yield row["id"], row["text"]


def quarters(memory: Sequence[tuple[float, float]]) -> list[int]:
    """The median memory of each quarter of the rows that was seen."""
    found = ([mib for share, mib in memory if quarter <= 4 * share < quarter + 1] for quarter in range(4))
    return [round(median(each)) for each in found if each]


def _produce(
    folder: Path, server: stack.Broker, rows: int, kill_at: float | None, window: int, observed: Observed
) -> None:
    """Start the producer; kill it when this share of the rows was sent, or await its end."""
    (_, before), began, cpu_s = _seen(folder), time.monotonic(), 0.0
    is_new = before == 0
    log = folder / "log"
    environment = {**os.environ, "IDEFICS_BROKER_URL": server.url, "IDEFICS_RESULT_BACKEND": server.results}
    command = [sys.executable, "-m", "tasks", "run", str(folder / "in.csv"), str(folder / "out.csv"), *PLAN]
    command += ["--window", str(window)]
    with (
        log.open("ab") as output,
        subprocess.Popen(command, cwd=stack.CHECKOUT, env=environment, stdout=output, stderr=output) as process,
    ):
        while process.poll() is None:
            sent, tokens = _seen(folder)
            if tokens > before and not is_new:
                observed.resumed_s.append(time.monotonic() - began)
                is_new = True
            with contextlib.suppress(psutil.NoSuchProcess):
                cpu_s = _note(observed, process.pid, sent / rows)
            if kill_at is not None and sent >= kill_at * rows:
                process.kill()
                process.wait()
                observed.kills += 1
                break
            time.sleep(LOOK_S)
    observed.cpu_s += cpu_s
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"The producer ended with {process.returncode}:\n{log.read_text()[-2000:]}")


def _seen(folder: Path) -> tuple[int, int]:
    """The rows that were sent, and the tokens of all answers: both are known without counting rows."""
    try:
        with CampaignState.read(folder / "out.csv.campaign") as state:
            return state.about.sent, state.about.tokens
    except CampaignError:
        # There is no state yet.
        return 0, 0


def _note(observed: Observed, pid: int, share: float) -> float:
    """Note a process' memory. Returns its processor time so far."""
    about = psutil.Process(pid)
    observed.memory.append((share, about.memory_info().rss / 2**20))
    return float(sum(about.cpu_times()[:2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", help="the name of the file in results/")
    asked = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        stack.broker() as server,
        stack.worker(server, settings={"MODEL": "fake"}),
    ):
        found = campaign(Path(folder), server, asked.rows, asked.kills, seed=asked.seed)
    print(json.dumps(found, indent=2))
    if asked.save:
        (RESULTS / f"{asked.save}.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
