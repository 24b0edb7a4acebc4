"""Pools for the tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery.worker import state as worker_state

from config.settings import Settings
from tests.unit.pool.bench import THREADS, Bench
from worker.pool import pool as pool_module


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bench]:
    for name in [name for name in os.environ if name.startswith("IDEFICS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(pool_module, "TICK_S", 0.02)
    bench = Bench(Settings(state_file=tmp_path / "state.json", prefetch=THREADS))
    yield bench
    worker_state.should_stop = None
    bench.pool.terminate()
    bench.hub.close()


@pytest.fixture
def started(bench: Bench) -> Bench:
    return bench.start()
