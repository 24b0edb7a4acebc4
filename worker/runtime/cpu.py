"""Cores and priorities of the model process's threads. On Linux only; elsewhere the system decides.

A sandbox may forbid either: then the worker is only slower.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Collection, Iterator

#: Niceness of the engine where it shares its cores with the job threads: under load it gets a tenth of a job thread's
#: share. A step costs nearly the same for few rows as for many, so fewer, later steps do the same work. On two cores a
#: niceness of 15 gave 7 to 10 % more jobs a second than 0; 10 as many as 15, and 5 slightly fewer.
ENGINE_NICENESS = 10
#: Of this many cores or more, decoding leaves two to the engine and the encoder.
MANY_CORES = 8


def all_cores() -> Collection[int]:
    """The cores that this process may use: those of its container or taskset, not of the machine."""
    # Those of the main thread, since others are bound to some.
    return os.sched_getaffinity(os.getpid()) if sys.platform == "linux" else range(os.cpu_count() or 1)


def job_cores(cores: Collection[int]) -> list[int]:
    """The cores for job threads: all but the first two, which the engine and the encoder keep; of few, the last half.

    Job threads share the interpreter, so together they use one core at a time. On two cores they moved between both and
    disturbed the engine on each; with one core for them, 12 % more jobs ran a second, and each took 8 % less time.
    """
    return sorted(cores)[min(2, len(cores) // 2) :]


def leave_cores_to_the_engine() -> None:
    """Keep the calling thread on the cores for job threads."""
    if sys.platform == "linux":
        _bind(threading.get_native_id(), job_cores(all_cores()))


def decoding_cores(cores: Collection[int]) -> list[int]:
    """The cores for decoding large files, which needs no interpreter: all, or of many those for job threads."""
    return sorted(cores) if len(cores) < MANY_CORES else job_cores(cores)


@contextlib.contextmanager
def on_decoding_cores() -> Iterator[None]:
    """Let the calling thread use the cores for decoding while the block runs."""
    if sys.platform != "linux":
        yield
        return
    thread = threading.get_native_id()
    own = os.sched_getaffinity(thread)
    _bind(thread, decoding_cores(all_cores()))
    try:
        yield
    finally:
        _bind(thread, own)


def _bind(thread: int, cores: Collection[int]) -> None:
    with contextlib.suppress(OSError):
        os.sched_setaffinity(thread, cores)


def go_last() -> None:
    """Let every other thread run before the calling one, and before those that it starts."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            # On Linux PRIO_PROCESS sets one thread's niceness.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), ENGINE_NICENESS)
