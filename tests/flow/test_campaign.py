"""`idefics-jobs run` on a real broker and worker: killed, gone on with, paused."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.campaign import PLAN, campaign, write_input
from tasks.campaign.state import CampaignState
from tests.support.waiting import eventually
from worker.demo import stack

#: Seconds in which a run ends, on a busy machine too.
END_S = 90


@pytest.fixture(scope="module")
def server() -> Iterator[stack.Broker]:
    with stack.broker() as server, stack.worker(server, "--without-mingle", settings={"MODEL": "fake"}):
        yield server


def command(server: stack.Broker, folder: Path, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "IDEFICS_BROKER_URL": server.url, "IDEFICS_RESULT_BACKEND": server.results}
    words = [sys.executable, "-m", "tasks", "run", str(folder / "in.csv"), str(folder / "out.csv"), *PLAN, *options]
    return subprocess.Popen(words, cwd=stack.CHECKOUT, env=environment, text=True, stderr=subprocess.PIPE)


def answered(folder: Path) -> int:
    path = folder / "out.csv.campaign"
    if not path.exists():
        return 0
    with CampaignState.read(path) as state:
        return state.counts().done


def test_a_killed_campaign_has_every_row_once_and_in_order(server: stack.Broker, tmp_path: Path) -> None:
    found = campaign(tmp_path, server, rows=800, kills=2, window=40)
    wrong = {name: found[name] for name in ("missing", "twice", "out_of_order", "other_answer")}
    assert wrong == dict.fromkeys(wrong, 0)
    assert found["kills"] == 2


def test_a_campaign_that_reaches_a_limit_or_is_interrupted_goes_on(server: stack.Broker, tmp_path: Path) -> None:
    write_input(tmp_path / "in.csv", 400)
    stopped = command(server, tmp_path, "--window", "20", "--budget-tokens", "1000")
    told = stopped.communicate(timeout=END_S)[1].splitlines()
    assert stopped.returncode == 3
    assert told[-1].startswith("Stopped: ")
    assert told[-1].endswith("run the same command with a higher limit to go on.")
    with (tmp_path / "out.csv").open(newline="") as file:
        codes = [row["error_code"] for row in csv.DictReader(file)]
    assert len(codes) == 400
    assert codes == sorted(codes), "rows that have not run are the last ones"
    assert 0 < codes.count("not_run") < 400

    before = answered(tmp_path)
    interrupted = command(server, tmp_path, "--window", "20")
    eventually(lambda: answered(tmp_path) > before)
    interrupted.send_signal(signal.SIGINT)
    interrupted.communicate(timeout=END_S)
    assert interrupted.returncode in (0, 130), "0: it was faster"

    finished = command(server, tmp_path)
    told = finished.communicate(timeout=END_S)[1].splitlines()
    assert (finished.returncode, told[-1].partition(": ")[2]) == (
        0,
        f"400 rows done, 0 of them failed. The output is {tmp_path}/out.csv.",
    )
