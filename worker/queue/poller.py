"""Kombu's poller, which renews the claims on held messages before it sweeps for those of silent workers."""

from __future__ import annotations

import time
from typing import Any

from kombu.transport import redis as stock
from redis.exceptions import ResponseError

#: Seconds between two reserves while the queues are empty.
POLL_S = 0.03
#: Seconds between two sweeps for messages whose visibility timeout is over, without an event loop.
SWEEP_S = 0.5


class Poller(stock.MultiChannelPoller):  # type: ignore[misc]
    """Kombu's, with waits short enough for the next reserve."""

    def __init__(self) -> None:
        super().__init__()
        self._swept_at = float("-inf")
        self._extended_at = time.monotonic()

    def get(self, callback: Any, timeout: float | None = None) -> Any:
        return super().get(callback, POLL_S if timeout is None else min(timeout, POLL_S))

    def maybe_restore_messages(self) -> Any:
        # `get` calls this after each of its waits.
        now = time.monotonic()
        if now - self._swept_at < SWEEP_S:
            return None
        self._swept_at = now
        stood_still = now - self._extended_at
        self.extend()
        if any(stood_still > channel.visibility_timeout / 2 for channel in self._holders):
            # The broker or this process hung: the other workers, too, must first be able to renew their claims.
            return None
        return super().maybe_restore_messages()

    def on_poll_init(self, poller: Any) -> None:
        # Kombu would sweep here: after an outage, before the other workers could renew their claims.
        self.poller = poller
        self._extended_at = time.monotonic()

    @property
    def _holders(self) -> list[Any]:
        return [channel for channel in self._channels if channel.acknowledges]

    def extend(self) -> None:
        """Tell the broker that all messages of this process are still held."""
        for channel in self._holders:
            try:
                channel.qos.extend()
            except (*channel.connection_errors, ResponseError) as error:
                channel.backoff.complain(error)
                return
        self._extended_at = time.monotonic()
