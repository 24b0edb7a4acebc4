"""What several kinds of tests use: a broker, the pictures, and settings of callbacks."""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterator

import pytest

from worker.demo import stack

PICTURES = stack.CHECKOUT / "worker" / "demo" / "pictures"
EXAMPLES = stack.CHECKOUT / "examples" / "pictures"

# Modules and collected tests are a million objects that stay. To search them for garbage again and again takes a fifth
# of the time of the collection.
gc.disable()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def broker() -> Iterator[stack.Broker]:
    """A Redis server without a worker."""
    with stack.broker() as server:
        yield server


#: What signs callbacks of the demo worker, under the id `main`.
SITE_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def callback_settings(port: int) -> dict[str, str]:
    """Of workers whose callbacks go to a server on this machine."""
    return {
        "CALLBACK_KEYS": f"main={SITE_SECRET}",
        "CALLBACK_ALLOW_HTTP": "true",
        "CALLBACK_ALLOW_NETWORKS": "127.0.0.0/8",
        "CALLBACK_PORTS": str(port),
    }
