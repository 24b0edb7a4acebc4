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

from benchmarks.campaign import PLAN, campaign, write_input, wrong
from tasks.campaign.state import CampaignState, StoredAnswer
from tests.support import stopping_output
from tests.support.waiting import eventually
from worker.demo import stack

#: Seconds in which a run ends, on a busy machine too.
END_S = 90


@pytest.fixture(scope="module")
def server() -> Iterator[stack.Broker]:
    with stack.broker() as server, stack.worker(server, "--without-mingle", settings={"MODEL": "fake"}):
        yield server


def command(server: stack.Broker, folder: Path, *options: str, module: str = "tasks") -> subprocess.Popen[str]:
    environment = {**os.environ, "IDEFICS_BROKER_URL": server.url, "IDEFICS_RESULT_BACKEND": server.results}
    words = [sys.executable, "-m", module, "run", str(folder / "in.csv"), str(folder / "out.csv"), *PLAN, *options]
    return subprocess.Popen(
        words, cwd=stack.CHECKOUT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


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


def answers(folder: Path) -> list[StoredAnswer]:
    with CampaignState.read(folder / "out.csv.campaign") as state:
        return list(state.answers())


def test_a_command_that_is_killed_while_it_writes_its_output_writes_it_again(
    server: stack.Broker, tmp_path: Path
) -> None:
    write_input(tmp_path / "in.csv", 300)
    command(server, tmp_path, "--window", "20", "--budget-tokens", "500").communicate(timeout=END_S)
    output, before = tmp_path / "out.csv", (tmp_path / "out.csv").read_bytes()

    killed = command(server, tmp_path, module=stopping_output.__name__)
    assert killed.stdout is not None
    assert killed.stdout.readline().strip() == stopping_output.STOPPED
    killed.kill()
    killed.communicate(timeout=END_S)
    # The earlier output is whole, and the answers are kept.
    assert output.read_bytes() == before
    assert len(list(tmp_path.glob(".out.csv.*.part"))) == 1
    known = answers(tmp_path)
    assert len(known) == 300

    finished = command(server, tmp_path)
    told = finished.communicate(timeout=END_S)[1].splitlines()
    assert (finished.returncode, told[-1].partition(":")[0]) == (0, "Finished")
    wrongs = wrong(output, 300)
    assert wrongs == dict.fromkeys(wrongs, 0)
    assert list(tmp_path.glob(".out.csv.*.part")) == []
    assert answers(tmp_path) == known, "no row was run again"
