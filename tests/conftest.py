"""What several kinds of tests use: a broker, the pictures, and settings of callbacks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from worker.demo import stack

PICTURES = stack.CHECKOUT / "worker" / "demo" / "pictures"
EXAMPLES = stack.CHECKOUT / "examples" / "pictures"


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
