"""A worker's state as a file, and the probe that reads it: `python -m worker.health [--ready | --alive]`.

Celery's own `inspect ping` is answered even while the model process is dead or hangs. The worker's parent process,
which knows the state, writes it to the file each second. A container runs the probe every few seconds, so the probe
starts fast: it imports neither torch nor Celery nor our settings, of which it reads two, IDEFICS_STATE_FILE and
IDEFICS_BROKER_URL.

Metrics are another matter: see `worker/observability`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import stat
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

logger = logging.getLogger(__name__)

SETTING = "IDEFICS_STATE_FILE"
#: The first of them that is set names the broker: Celery's own, which `celery -b` sets, has precedence.
BROKER_SETTINGS = ("CELERY_BROKER_URL", "IDEFICS_BROKER_URL")
DEFAULT_BROKER = "redis://localhost:6379/0"
#: Seconds between two writes of an unchanged state.
RENEW_S = 1.0
#: Seconds without a write after which a worker is not ready.
READY_WITHIN_S = 15.0
#: Seconds without a write after which it is not alive. Longer: a parent that waits for the broker does not write, and
#: to restart it would only load the model again.
ALIVE_WITHIN_S = 300.0


class WorkerState(Enum):
    """What a worker does, and what its operator should do."""

    STARTING = "The model loads, or Redis does not answer yet: wait."
    READY = "It takes jobs."
    BUSY = "All its places are taken: add workers if jobs wait for too long."
    SETUP_FAILED = "The model cannot be served: correct what the reason names and start the worker again."
    UNHEALTHY = "See its log."


@dataclass(frozen=True, slots=True)
class HealthReport:
    """The state that a worker last wrote."""

    state: WorkerState
    reason: str
    #: Its node name.
    worker: str
    pid: int
    #: When that process started, as the kernel says: its pid may be used again.
    born: str
    #: Seconds since it was written.
    age_s: float = 0.0
    #: As from `broker_here`.
    broker: str = ""

    @property
    def is_running(self) -> bool:
        return born_at(self.pid) == self.born

    @property
    def is_ready(self) -> bool:
        return self.is_running and self.age_s <= READY_WITHIN_S and self.state in (WorkerState.READY, WorkerState.BUSY)

    @property
    def is_alive(self) -> bool:
        """False if a restart would help. True while the worker is well, loads, or replaces its model process."""
        return self.is_running and self.age_s <= ALIVE_WITHIN_S and self.state is not WorkerState.SETUP_FAILED

    def __str__(self) -> str:
        state, reason = self.state, self.reason
        if state is not WorkerState.SETUP_FAILED and not self.is_running:
            state, reason = WorkerState.UNHEALTHY, "it was killed or crashed: start it again"
        elif state is not WorkerState.SETUP_FAILED and self.age_s > READY_WITHIN_S:
            state, reason = WorkerState.UNHEALTHY, f"silent for {self.age_s:.0f} s: it hangs, or the broker is away"
        return f"{self.worker}: {state.name}{f' ({reason})' if reason else ''}. {state.value}"


def born_at(pid: int) -> str:
    """When a process started, in the kernel's ticks; empty where there is none. It tells processes of one pid apart."""
    try:
        # The name in parentheses may have spaces.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def broker_here() -> str:
    """This environment's broker, as `127.0.0.1:6379/0`: enough to identify it, without a password."""
    url = next(filter(None, map(os.environ.get, BROKER_SETTINGS)), DEFAULT_BROKER)
    try:
        return ";".join(map(_place, filter(None, url.split(";"))))
    except ValueError:
        return "an unreadable URL"


def _place(url: str) -> str:
    parts, host = urlsplit(url), urlsplit(url).hostname or ""
    # For a socket and for Sentinel the query names the database or the server.
    query = parse_qs(parts.query)
    chosen = "".join(f"?{name}={query[name][0]}" for name in ("virtual_host", "master_name") if name in query)
    host = "127.0.0.1" if host in ("localhost", "::1") else host
    return f"{host}:{parts.port or 6379}{parts.path if parts.path.strip('/') else '/0'}{chosen}"


def folder() -> Path:
    """The folder where workers without the setting write, each under its pid."""
    return Path(tempfile.gettempdir()) / f"idefics-workers-{os.getuid()}"


class StateFile:
    """The worker's side."""

    def __init__(self, path: Path | None, worker: str) -> None:
        self._path = path or folder() / f"{os.getpid()}.json"
        self._is_shared = path is None
        self._worker = worker
        self._state: WorkerState | None = None
        self._written_at = 0.0
        self._fails = False

    def show(self, state: WorkerState, reason: str = "") -> None:
        """Write a state if it is new or was written a while ago. If writing fails the worker goes on, and logs it once.

        After SETUP_FAILED no other state is written.
        """
        now = time.monotonic()
        if self._state is WorkerState.SETUP_FAILED or (state is self._state and now - self._written_at < RENEW_S):
            return
        is_first, self._state, self._written_at = self._state is None, state, now
        try:
            if is_first and self._is_shared:
                _clean(self._path.parent)
            pid = os.getpid()
            self._write(HealthReport(state, reason, self._worker, pid, born_at(pid), broker=broker_here()))
            self._fails = False
        except OSError as error:
            if not self._fails:
                logger.error("The worker's state cannot be written: %s. Its probe will fail; see %s.", error, SETTING)
            self._fails = True

    def remove(self) -> None:
        """Remove the file at an orderly end. SETUP_FAILED stays, to be read."""
        if self._state is not WorkerState.SETUP_FAILED:
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _write(self, report: HealthReport) -> None:
        draft = self._path.with_suffix(f".{os.getpid()}.draft")
        draft.write_text(json.dumps({**asdict(report), "state": report.state.name}))
        draft.replace(self._path)


def _clean(folder: Path) -> None:
    """Make the folder, without the files of workers that were killed."""
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        # In a folder that is writable for all, another user may have made it, or a link to one of our folders.
        raise PermissionError(f"{folder} is not this user's own folder")
    for path in folder.glob("*.json"):
        report = _read(path)
        if report is None or not report.is_running:
            path.unlink(missing_ok=True)


def _read(path: Path) -> HealthReport | None:
    try:
        fields = json.loads(path.read_text())
        age_s = max(0.0, time.time() - path.stat().st_mtime)
        return HealthReport(**{**fields, "state": WorkerState[fields["state"]], "age_s": age_s})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def reports(path: Path | None, worker: str | None = None) -> list[HealthReport]:
    """The states of a file's worker, or of all workers on this machine, of any broker."""
    paths: Iterable[Path] = [path] if path else folder().glob("*.json")
    return [report for report in map(_read, sorted(paths)) if report and worker in (None, report.worker)]


def _shown(found: list[HealthReport]) -> list[HealthReport]:
    """The running workers; if there are none, the ended ones."""
    return [report for report in found if report.is_running] or found


def _without_worker(elsewhere: Iterable[HealthReport]) -> str:
    """The line for a broker without a worker; it names the workers of other brokers."""
    line = f"No worker of {broker_here()}: none runs here, or its {SETTING} is another."
    others = ", ".join(f"{report.worker} of {report.broker}" for report in elsewhere if report.is_running)
    return f"{line} Of other brokers, as IDEFICS_BROKER_URL would name them: {others}." if others else line


def on_one_line(text: str) -> str:
    """Escape unprintable characters, which a reason may have from a checkpoint. `tasks.printable` imports slowly."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def main() -> int:
    """Print the state of the workers on this machine that take from this environment's broker (IDEFICS_BROKER_URL).
    The exit status is 0 where all are as asked, else 1."""
    parser = argparse.ArgumentParser("python -m worker.health", description=main.__doc__)
    check = parser.add_mutually_exclusive_group()
    check.add_argument("--ready", action="store_true", help="they can run jobs (the default)")
    check.add_argument("--alive", action="store_true", help="a restart would not help: well, loading, or recovering")
    parser.add_argument("--worker", metavar="NAME", help="one of several, as gpu0@host")
    options = parser.parse_args()
    path = os.environ.get(SETTING)
    known = reports(Path(path) if path else None, options.worker)
    # A named file is shown for any broker.
    found = _shown([report for report in known if path or report.broker == broker_here()])
    lines = map(str, found) if found else [_without_worker(known)]
    sys.stdout.writelines(f"{on_one_line(line)}\n" for line in lines)
    is_good = found and all(report.is_alive if options.alive else report.is_ready for report in found)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
