"""Writes the workers' ledger without any change of the worker: Celery takes its loader from CELERY_LOADER.

Both of a worker's processes import it, and so does the one that runs the links (notes.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from celery import signals
from celery.loaders.app import AppLoader

from benchmarks.chaos.ledger import STEPS, WORKER, Ledger, Step, now

_ledger = Ledger(Path(os.environ[STEPS]))


class Loader(AppLoader):  # type: ignore[misc]
    """Celery's own."""


def _note(what: str, id: str = "") -> None:
    _ledger.write(Step(now(), os.environ[WORKER], what, id))


@signals.worker_init.connect  # type: ignore[untyped-decorator]
def _born(**_: Any) -> None:
    _note("born")


@signals.task_received.connect  # type: ignore[untyped-decorator]
def _received(request: Any, **_: Any) -> None:
    _note("received", request.id)


@signals.task_prerun.connect  # type: ignore[untyped-decorator]
def _started(task_id: str, **_: Any) -> None:
    _note("started", task_id)


@signals.task_postrun.connect  # type: ignore[untyped-decorator]
def _ended(task_id: str, state: str | None = None, **_: Any) -> None:
    _note(state or "DROPPED", task_id)
