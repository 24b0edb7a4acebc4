"""A service with the fake model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from config.settings import Settings
from tests.unit.service.jobs import Start
from worker.engine.engine import Engine
from worker.engine.scheduler import Limits
from worker.jobs.service import Service
from worker.models.fake import FakeModel


@pytest.fixture
def start() -> Iterator[Start]:
    """A service with these settings on a fake model."""
    engines: list[Engine] = []

    def service(model: FakeModel | None = None, **settings: Any) -> Service:
        model = model or FakeModel()
        engine = Engine(model, Limits(rows=8, tokens=1_000_000))
        engine.start()
        engines.append(engine)
        return Service(Settings(**settings), model.info, model.codec, engine)

    yield service
    for engine in engines:
        engine.stop()


@pytest.fixture
def service(start: Start) -> Service:
    return start()
