"""The sweep: messages whose holder was silent for the visibility timeout go back to their queues, and are counted."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

from kombu.transport import redis as stock
from kombu.utils.json import dumps

from tasks.redis_keys import REDELIVERIES
from worker.queue.envelope import NO_ENVELOPE, MessageRefused, described, given_back, returned_job, usable_id
from worker.queue.redeliveries import kept_s

logger = logging.getLogger(__name__)

#: Called with each unreadable message before it is dropped.
OnRefused = Callable[[bytes, MessageRefused], object]


def log_refused(raw: bytes, refused: MessageRefused) -> None:
    logger.critical("%s is dropped. %s", described(raw, refused), refused)


class _NotKept(Exception):
    """An unreadable message could not be stored, so it must not be dropped."""


class RestoringQoS(stock.QoS):  # type: ignore[misc]
    """Kombu's. Counts messages that return from silent workers, and survives unreadable records.

    Its channel has a `backoff` and `on_refused`.
    """

    def restore_visible(self, start: int = 0, num: int | None = 10, interval: int = 10) -> None:
        """Kombu's, by the server's clock. The workers of these messages died, froze or were cut off."""
        self._vrestore_count += 1
        if (self._vrestore_count - 1) % (interval or 1):
            return
        with (
            self.channel.conn_or_acquire() as redis,
            contextlib.suppress(stock.MutexHeld),
            stock.Mutex(redis, self.unacked_mutex_key, self.unacked_mutex_expire),
        ):
            seconds, microseconds = redis.time()
            latest = seconds + microseconds / 1e6 - self.visibility_timeout
            options = {"desc": True, "byscore": True, "offset": num and start, "num": num}
            for tag in redis.zrange(self.unacked_index_key, latest, 0, **options):
                self.restore_by_tag(tag, redis, is_lost=True)

    def restore_by_tag(self, tag: str, client: Any = None, leftmost: bool = False, *, is_lost: bool = False) -> None:
        """Put a message back to its queue. Kombu's own drops an unreadable record, or fails in every worker."""

        def restore(pipe: Any) -> None:
            record = pipe.hget(self.unacked_key, tag)
            pipe.multi()
            self._remove_from_indices(tag, pipe)
            if record:
                message = self._put_back(record, pipe.lpush if leftmost else pipe.rpush)
                if is_lost:
                    self._count_return(message, pipe)

        with self.channel.conn_or_acquire(client) as redis, contextlib.suppress(_NotKept):
            redis.transaction(restore, self.unacked_key)

    def _put_back(self, record: bytes, push: Callable[[str, str], Any]) -> dict[str, Any]:
        """Push the message of a record to its queue, and return it; empty where it was refused."""
        try:
            message, exchange, routing_key = given_back(record)
            raw = dumps(message)
        except MessageRefused as refused:
            self._keep_refused(record, refused)
            return {}
        except Exception:
            self._keep_refused(record, MessageRefused(NO_ENVELOPE))
            return {}
        for queue in self.channel._lookup(exchange, routing_key):
            push(self.channel._q_for_pri(queue, self.priority_of(message)), raw)
        return message

    def _count_return(self, message: dict[str, Any], pipe: Any) -> None:
        key = returned_job(message)
        if key is not None:
            # Kombu's client prefixes the keys of some commands only, and these are not among them.
            name = f"{self.channel.global_keyprefix}{REDELIVERIES.named(key[0])}"
            pipe.hincrby(name, str(key[1]), 1).expire(name, kept_s(self.channel))

    def _keep_refused(self, record: bytes, refused: MessageRefused) -> None:
        """Raises _NotKept if that fails: then the record stays where it is, and the next sweep finds it."""
        try:
            self.channel.on_refused(record, refused)
        except Exception as error:
            self.channel.backoff.complain(error)
            raise _NotKept from error

    def priority_of(self, message: dict[str, Any]) -> int:
        try:
            return int(self.channel._get_message_priority(message, reverse=False))
        except ArithmeticError:
            # The message's priority is infinite.
            return int(self.channel.default_priority)


def redelivered_id(message: Any) -> str | None:
    """The id in one of kombu's messages that says that it was redelivered; None for others."""
    if message is None or not message.delivery_info.get("redelivered") or not isinstance(message.headers, dict):
        return None
    return usable_id(message.headers.get("id"))
