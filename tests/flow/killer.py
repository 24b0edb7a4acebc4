"""Kills a worker's process where it would record a callback, once: the worker of a test has it as CELERY_LOADER."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from celery.loaders.app import AppLoader

from tasks.outbox import Outbox

LOADER = "CELERY_LOADER"
#: The file that says that it has happened, and in which process.
MARK = "KILLER_MARK"
#: Set where a model process takes its parent along.
WHOLE_WORKER = "KILLER_WHOLE_WORKER"

_add = Outbox.add


class Loader(AppLoader):  # type: ignore[misc]
    """Celery's own."""

    def on_worker_init(self) -> None:
        """Called in both of a worker's processes, and in no producer."""
        Outbox.add = _die  # type: ignore[method-assign]


def _die(self: Outbox, *arguments: Any) -> bool:
    try:
        with Path(os.environ[MARK]).open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return _add(self, *arguments)
    # The pool starts model processes with this.
    if os.environ.get(WHOLE_WORKER) and "FORKED_BY_MULTIPROCESSING" in os.environ:
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")
