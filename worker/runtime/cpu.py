"""On which cores the model process's threads run, and which goes first. Elsewhere than on Linux: as it comes.

A sandbox may forbid either: then it is only slower.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Collection

#: The engine's niceness where it computes on the cores of those who feed it, a tenth of their share where all want one:
#: a step costs nearly the same for few rows as for many, so the later it gets to it, the fewer it makes. On two cores
#: 15 makes 7 to 10 % more jobs a second than 0; 10 as many as 15, and 5 a little fewer.
LAST = 10


def all_cores() -> Collection[int]:
    """Those that this process may use: a container's or a taskset's, not the machine's."""
    return os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1)


def job_cores(cores: Collection[int]) -> list[int]:
    """Those that job threads keep to: not the first two, for the engine and the encoder; of few, the last half.

    Job threads take turns at the interpreter. On two cores they did so from one to the other, and the engine found
    neither free: 12 % more jobs a second with one, for 8 % less time of each job.
    """
    return sorted(cores)[min(2, len(cores) // 2) :]


def leave_cores_to_the_engine() -> None:
    """The calling thread keeps to the others."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setaffinity(threading.get_native_id(), job_cores(all_cores()))


def go_last() -> None:
    """Every other thread goes before the calling one, and before those that it starts."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            # There a thread's own, whatever its name says.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LAST)
