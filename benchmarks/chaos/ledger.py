"""Ledgers: lines of JSON in files, which outlive the processes that write them."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

#: Environment variables of the processes that write ledgers.
WORKER = "CHAOS_WORKER"
STEPS = "CHAOS_STEPS"
CALLS = "CHAOS_CALLS"
BROKER = "CHAOS_BROKER"
VISIBILITY_S = "CHAOS_VISIBILITY_S"


@dataclass(frozen=True, slots=True)
class Accepted:
    """Written by the producer: the broker has accepted the job. `at` is always in unix seconds."""

    at: float
    id: str
    countdown: float = 0.0
    is_poison: bool = False
    is_linked: bool = False
    is_pictured: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """A worker's: what happened to a job. `born` is the worker itself, which has no job then."""

    at: float
    worker: str
    #: born, received, started, or the state in which a run ended.
    what: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class End:
    """Written by the receiver: a terminal state that it has read. One entry for each time it was read."""

    at: float
    id: str
    state: str
    #: Of the whole record: of two runs' records it is not the same.
    digest: str
    #: A failed job's.
    code: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """The receiver's: a `link` or an `errback` of a job was called."""

    at: float
    id: str
    what: str


@dataclass(frozen=True, slots=True)
class Strike:
    """What was done to whom, and for how long, in seconds."""

    at: float
    kind: str
    target: str
    hold_s: float


Entry = TypeVar("Entry", Accepted, Step, End, Call, Strike)


class Ledger:
    """Appends; what is written is with the kernel, and so outlives a kill -9."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, entry: Accepted | Step | End | Call | Strike) -> None:
        os.write(self._fd, json.dumps(asdict(entry)).encode() + b"\n")


def read(path: Path, kind: type[Entry]) -> list[Entry]:
    """A ledger's entries in the order of their times; what was never written has none."""
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted((kind(**json.loads(line)) for line in lines), key=lambda entry: entry.at)


def now() -> float:
    return round(time.time(), 4)
