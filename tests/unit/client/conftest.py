"""A client whose broker is in memory."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from tasks import Client
from tests.unit.client.messages import RESULTS


@pytest.fixture(autouse=True)
def _no_urls_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IDEFICS_BROKER_URL", raising=False)
    monkeypatch.delenv("IDEFICS_RESULT_BACKEND", raising=False)


@pytest.fixture
def client() -> Iterator[Client]:
    """Its queue is its own: the broker in memory is shared by the whole process."""
    client = Client("memory://", result_backend=RESULTS, queue=uuid.uuid4().hex)
    yield client
    client.app.close()


@pytest.fixture
def id() -> str:
    """Of a job that somebody else submitted."""
    return uuid.uuid4().hex
