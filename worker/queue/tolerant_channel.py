"""Kombu's channel for untrusted messages and full servers."""

from __future__ import annotations

import logging
from queue import Empty
from typing import Any

from kombu.transport import redis as stock
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from tasks.availability import is_away
from tasks.routing import priority_for
from worker.observability.redaction import without_message
from worker.queue.backoff import Backoff
from worker.queue.due import purge
from worker.queue.envelope import MessageRefused, opened
from worker.queue.pending_acks import PendingAcks
from worker.queue.reserve import Reserved
from worker.queue.visibility_timeout import OnRefused

logger = logging.getLogger(__name__)


class TolerantChannel(stock.Channel):  # type: ignore[misc]
    """Kombu's. Neither a message nor a refusal of a full server ends the process."""

    pending_acks: PendingAcks

    def __init__(self, connection: Any, **options: Any) -> None:
        #: Bytes up to which a compressed body is inflated.
        self.most_bytes = 32_000_000
        self.backoff = Backoff()
        self.on_refused: OnRefused = connection.on_refused
        #: The message that is being delivered, and the unix seconds of the server's clock at which it was taken.
        self._reserved: Reserved | None = None
        self.taken_at = 0.0
        self._command_client: Any = None
        try:
            super().__init__(connection, **options)
        except ResponseError as error:
            # A full server may refuse even PING. As a connection error it is retried, with growing pauses.
            if is_away(error):
                raise RedisConnectionError(str(error)) from error
            raise

    @property
    def recorded(self) -> str | None:
        """The tag of the message that is being delivered, where it is recorded in `unacked`."""
        return self._reserved.tag if self._reserved else None

    def _create_client(self, asynchronous: bool = False) -> Any:
        if asynchronous:
            return super()._create_client(asynchronous)
        # Kombu makes a client for every command, which costs more than the command.
        if self._command_client is None or self._command_client.connection_pool is not self.pool:
            self._command_client = super()._create_client()
        return self._command_client

    def _opened(self, reserved: Reserved) -> dict[str, Any]:
        """The message. Raises Empty for one that is refused."""
        try:
            message = opened(reserved.raw, reserved.queue, self.most_bytes)
        except MessageRefused as refused:
            try:
                self._drop(reserved, refused)
            except Exception as error:
                # A message is dropped only once its refusal is stored.
                self.backoff.complain(error)
                if reserved.tag:
                    self.pending_acks.requeue(reserved.tag, last=True)
            raise Empty from None
        if reserved.tag:
            message["properties"]["delivery_tag"] = reserved.tag
        return message

    def _deliver_reserved(self, reserved: Reserved) -> None:
        """Give a message to its queue's consumer. Raises Empty for one that is refused."""
        self._reserved, self.taken_at = reserved, reserved.at
        message = self._opened(reserved)
        self._queue_cycle.rotate(reserved.queue)
        try:
            self.connection._deliver(message, reserved.queue)
        except self.connection_errors:
            raise
        except Exception as error:
            # Our own defect, not the sender's fault. The message is requeued once; a second time would loop.
            defect = without_message(error)
            logger.error("A defect while a message of queue %s was delivered.", reserved.queue, exc_info=defect)
            if not reserved.tag:
                pass
            elif message["properties"]["delivery_info"].get("redelivered"):
                self._drop(reserved, MessageRefused("The worker has a defect: its log has the traceback."))
            else:
                self.qos.reject(reserved.tag, requeue=True)

    def _drop(self, reserved: Reserved, refused: MessageRefused) -> None:
        self.on_refused(reserved.raw, refused)
        if reserved.tag:
            self.qos.ack(reserved.tag)

    def _receive_one(self, client: Any) -> Any:
        """Kombu's, for a message on a channel that every process may publish to."""
        try:
            return super()._receive_one(client)
        except (Empty, ResponseError, *self.connection_errors):
            raise
        except Exception as error:
            logger.error("A message on a Redis channel cannot be read (%s); it is dropped.", type(error).__name__)
            raise Empty from None

    def _get_message_priority(self, message: Any, *args: Any, **options: Any) -> int:
        """Kombu's, with our bounds. The messages of other apps' dead workers are returned through here, too."""
        priority: int = super()._get_message_priority(message, *args, **options)
        headers = message.get("headers")
        task = headers.get("task") if isinstance(headers, dict) else None
        return int(priority_for(task, priority)) if task is not None else priority

    def _purge(self, queue: str) -> int:
        return int(super()._purge(queue)) + purge(self, queue)

    def _queue_bind(self, *args: Any) -> None:
        try:
            super()._queue_bind(*args)
        except ResponseError as error:
            # A worker that starts while the server is full can consume, and so empty it, without a binding.
            if not is_away(error):
                raise
            self.backoff.complain(error)
