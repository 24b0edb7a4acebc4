"""A worker's state file and its probe, without a worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from config import settings
from worker import health
from worker.health import ALIVE_WITHIN_S, READY_WITHIN_S, StateFile, WorkerState

Probe = Callable[..., tuple[int, str]]
#: The default one's place.
BROKER = "127.0.0.1:6379/0"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state.json"


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the workers that were given no file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("IDEFICS_STATE_FILE", "IDEFICS_BROKER_URL", "CELERY_BROKER_URL"):
        monkeypatch.delenv(name, raising=False)
    return health.folder()


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Probe:
    """Exit status and output."""

    def run(*arguments: str, file: Path | None = None) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["health", *arguments])
        if file:
            monkeypatch.setenv("IDEFICS_STATE_FILE", str(file))
        return health.main(), capsys.readouterr().out

    return run


def age(file: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(file, (then, then))


def of_another(
    folder: Path,
    pid: int,
    worker: str = "gone@here",
    state: WorkerState = WorkerState.READY,
    born: str = "5",
    broker: str = BROKER,
) -> Path:
    """The file of another process; of one that is no more, unless it is `born` rightly: no pid is 2**22 or more."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{pid}.json"
    said = {"state": state.name, "reason": "", "worker": worker, "pid": pid, "born": born, "broker": broker}
    file.write_text(json.dumps(said))
    return file


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """Another process of this machine."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("state", "ready", "alive"),
    [
        (WorkerState.STARTING, 1, 0),
        (WorkerState.READY, 0, 0),
        (WorkerState.BUSY, 0, 0),
        (WorkerState.UNHEALTHY, 1, 0),
        (WorkerState.SETUP_FAILED, 1, 1),
    ],
)
def test_a_state_is_ready_or_alive_or_neither(
    file: Path, probe: Probe, state: WorkerState, ready: int, alive: int
) -> None:
    StateFile(file, "a@b").show(state, "why")
    assert probe("--ready", file=file) == (ready, f"a@b: {state.name} (why). {state.value}\n")
    assert probe(file=file)[0] == ready
    assert probe("--alive", file=file)[0] == alive


def test_a_silent_worker_is_unhealthy_and_soon_not_ready_and_late_not_alive(file: Path, probe: Probe) -> None:
    StateFile(file, "a@b").show(WorkerState.READY)
    age(file, READY_WITHIN_S + 1)
    status, said = probe("--ready", file=file)
    assert status == 1
    assert "UNHEALTHY (silent for 16 s" in said
    assert probe("--alive", file=file)[0] == 0
    age(file, ALIVE_WITHIN_S + 1)
    assert probe("--alive", file=file)[0] == 1


def test_a_worker_that_was_killed_is_unhealthy(shared: Path, probe: Probe) -> None:
    of_another(shared, 2**22)
    for kind in ("--ready", "--alive"):
        status, said = probe(kind)
        assert status == 1
        assert said.startswith("gone@here: UNHEALTHY (it was killed")


def test_another_process_under_the_same_pid_is_not_the_worker(shared: Path, probe: Probe) -> None:
    of_another(shared, os.getpid())
    assert probe()[0] == 1


def test_a_failed_start_is_still_reported_when_the_process_is_gone(shared: Path, probe: Probe) -> None:
    of_another(shared, 2**22, state=WorkerState.SETUP_FAILED)
    status, said = probe("--ready")
    assert status == 1
    assert "SETUP_FAILED" in said


def test_without_a_worker_nothing_is_ready(shared: Path, probe: Probe) -> None:
    assert probe() == (
        1,
        "No worker of 127.0.0.1:6379/0: none runs here, or its IDEFICS_STATE_FILE is another.\n",
    )


def test_workers_of_one_machine_do_not_clash(shared: Path, probe: Probe, sleeper: subprocess.Popen[bytes]) -> None:
    StateFile(None, "a@b").show(WorkerState.READY)
    of_another(shared, sleeper.pid, "c@d", WorkerState.STARTING, health.born_at(sleeper.pid))
    status, said = probe()
    assert status == 1
    assert {line.split(":")[0] for line in said.splitlines()} == {"a@b", "c@d"}
    assert probe("--worker", "a@b")[0] == 0
    assert probe("--worker", "c@d")[0] == 1


def test_a_worker_of_another_broker_is_named_and_makes_nothing_ready(
    shared: Path, probe: Probe, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_another(shared, sleeper.pid, "c@d", born=health.born_at(sleeper.pid), broker="127.0.0.1:7101/0")
    status, said = probe()
    assert status == 1
    assert said.startswith("No worker of 127.0.0.1:6379/0: ")
    assert "c@d of 127.0.0.1:7101/0" in said
    monkeypatch.setenv("IDEFICS_BROKER_URL", "redis://:secret@localhost:7101")
    assert probe() == (0, f"c@d: READY. {WorkerState.READY.value}\n")
    # This environment's own worker, beside it.
    StateFile(None, "a@b").show(WorkerState.UNHEALTHY)
    assert probe()[0] == 1
    assert probe("--worker", "c@d")[0] == 0


def test_an_unhealthy_worker_of_another_broker_is_not_reported(
    shared: Path, probe: Probe, sleeper: subprocess.Popen[bytes]
) -> None:
    StateFile(None, "a@b").show(WorkerState.READY)
    of_another(shared, sleeper.pid, "c@d", WorkerState.UNHEALTHY, health.born_at(sleeper.pid), "127.0.0.1:7101/0")
    assert probe() == (0, f"a@b: READY. {WorkerState.READY.value}\n")


def test_a_file_that_is_named_is_read_whatever_its_broker(
    file: Path, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    StateFile(file, "a@b").show(WorkerState.READY)
    monkeypatch.setenv("IDEFICS_BROKER_URL", "redis://elsewhere/0")
    assert probe(file=file)[0] == 0


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("redis://localhost", "127.0.0.1:6379/0"),
        ("redis://:secret@[::1]:7101/", "127.0.0.1:7101/0"),
        ("rediss://user:secret@Redis.example/3?ssl_cert_reqs=required", "redis.example:6379/3"),
        ("redis+socket://:secret@/run/redis.sock?virtual_host=1", ":6379/run/redis.sock?virtual_host=1"),
        (
            "sentinel://:secret@a:26379;sentinel://b:26379/0?master_name=m&sentinel_password=secret",
            "a:26379/0;b:26379/0?master_name=m",
        ),
        ("redis://localhost:x", "an unreadable URL"),
        ("", "127.0.0.1:6379/0"),
    ],
)
def test_a_broker_is_known_by_its_place_without_a_password(
    url: str, place: str, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IDEFICS_BROKER_URL", url)
    assert health.broker_here() == place


def test_the_brokers_default_is_the_settings() -> None:
    assert health.DEFAULT_BROKER == settings.DEFAULT_BROKER


def test_a_dead_worker_is_not_asked_where_another_lives(shared: Path, probe: Probe) -> None:
    StateFile(None, "a@b").show(WorkerState.READY)
    of_another(shared, 2**22)
    assert probe() == (0, f"a@b: READY. {WorkerState.READY.value}\n")


def test_a_new_worker_takes_the_files_of_killed_ones_away(shared: Path) -> None:
    gone = of_another(shared, 2**22)
    (shared / "junk.json").write_text("{")
    StateFile(None, "a@b").show(WorkerState.STARTING)
    assert not gone.exists()
    assert [path.name for path in shared.iterdir()] == [f"{os.getpid()}.json"]


def test_the_workers_folder_is_their_users_alone(shared: Path) -> None:
    StateFile(None, "a@b").show(WorkerState.STARTING)
    assert shared.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_another_user_made_is_not_touched(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "data.json").write_text("{}")
    shared.symlink_to(precious)
    StateFile(None, "w").show(WorkerState.READY)
    assert [path.name for path in precious.iterdir()] == ["data.json"]
    assert "own folder" in caplog.text


def test_an_orderly_end_leaves_no_file_and_a_failed_start_its_reason(file: Path) -> None:
    ended, broken = StateFile(file, "a@b"), StateFile(file, "a@b")
    ended.show(WorkerState.READY)
    ended.remove()
    assert not file.exists()
    broken.show(WorkerState.SETUP_FAILED, "no such model")
    broken.show(WorkerState.STARTING)
    broken.remove()
    assert json.loads(file.read_text())["reason"] == "no such model"


def test_an_unchanged_state_is_written_again_after_a_second_and_a_new_one_at_once(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    shown = StateFile(file, "a@b")
    shown.show(WorkerState.READY, "1 jobs")
    shown.show(WorkerState.READY, "2 jobs")
    assert "1 jobs" in file.read_text()
    now += health.RENEW_S
    shown.show(WorkerState.READY, "3 jobs")
    assert "3 jobs" in file.read_text()
    shown.show(WorkerState.BUSY, "4 jobs")
    assert "4 jobs" in file.read_text()


def test_a_place_that_cannot_be_written_is_told_once_and_the_worker_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shown = StateFile(tmp_path / "nowhere" / "state.json", "a@b")
    for state in (WorkerState.STARTING, WorkerState.READY, WorkerState.BUSY):
        shown.show(state)
    assert len(caplog.records) == 1
    assert "IDEFICS_STATE_FILE" in caplog.text


def test_the_probe_loads_neither_celery_nor_torch_nor_our_settings() -> None:
    code = "import sys, worker.health; print(sorted({'celery', 'torch', 'pydantic', 'config'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr
