"""Kombu's Redis transport with an atomic reserve: a message is in its queue or in `unacked`, never in between.

Stock kombu takes a message with BRPOP and writes it to `unacked` afterwards: a worker that dies between the two loses
it. Here one Lua script does both (worker/queue/reserve.py). It cannot block, so the event loop calls it every `POLL_S`
seconds. Everything else is kombu's, its keys and their form too: stock consumers and producers may share the broker.

Acks and requeues that the broker has not been sent are kept, and sent later (worker/queue/pending_acks.py).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import time
from collections.abc import Callable, Mapping
from queue import Empty
from typing import Any

from kombu import transport
from kombu.transport import redis as stock
from redis.exceptions import NoScriptError, ResponseError

from tasks.availability import is_demoted
from tasks.redis_keys import DUE, DUE_IDS
from worker.queue.broker_rights import check_may_reserve, readable_separators
from worker.queue.due import RESERVE_EARLY, DueJob
from worker.queue.pending_acks import DelayedMessage, pending_acks
from worker.queue.plain_transport import PlainSentinelTransport, PlainTransport
from worker.queue.poller import POLL_S, Poller
from worker.queue.qos import QoS
from worker.queue.reserve import RESERVE, RESERVE_SHA, ReserveRequest, record_ending, reserve_request
from worker.queue.tolerant_channel import TolerantChannel
from worker.queue.visibility_timeout import OnRefused, log_refused

logger = logging.getLogger(__name__)

#: Seconds after which a reply is stale: its message may have been given to another worker meanwhile.
STALE_REPLY_S = 5.0
#: A worker renews its claims on messages after a quarter of the visibility timeout, within these bounds in seconds.
MIN_EXTEND_S, MAX_EXTEND_S = 0.25, 10.0


def use(on_refused: OnRefused = log_refused, *, atomic: bool = True) -> None:
    """Have this process's Redis connections reserve atomically, or as kombu does where the broker runs no scripts.

    `on_refused` is called with each message that is dropped because it cannot be read, before it is dropped.
    """
    plain, sentinel = (Transport, SentinelTransport) if atomic else (PlainTransport, PlainSentinelTransport)
    # By alias: a class in `broker_transport` would be forgotten at the fail-over to another URL.
    for alias, kind in {"redis": plain, "rediss": plain, "sentinel": sentinel}.items():
        members = {"on_refused": staticmethod(on_refused)}
        transport.TRANSPORT_ALIASES[alias] = functools.partial(type, kind.__name__, (kind,), members)
        transport._transport_cache.pop(alias, None)


class Channel(TolerantChannel):
    """Kombu's, with the atomic reserve. The methods named after BRPOP are those that kombu's poller calls."""

    QoS = QoS

    #: The connection that a reserve is in flight on.
    _in_poll: Any = None

    def __init__(self, connection: Any, **options: Any) -> None:
        #: Whether to reserve messages that need an acknowledgement now.
        self.can_accept: Callable[[], bool] = lambda: True
        #: Number of messages that are held, and do not count for the prefetch limit.
        self.parked: Callable[[], int] = lambda: 0
        #: Of each queue with acknowledgements, the end of its records in `unacked`.
        self._record_endings: dict[str, str] = {}
        self._request: ReserveRequest | None = None
        self._is_script_cached = True
        super().__init__(connection, **options)
        #: Before a priority in the names of the lists that are read.
        self._separators = [self.sep]
        self.pending_acks = pending_acks(
            self.broker_identity(connection.client), self.global_keyprefix, self.unacked_key
        )

    @staticmethod
    def broker_identity(connection: Any) -> str:
        """Tells one broker from another."""
        return str(connection.as_uri())

    @property
    def record_endings(self) -> Mapping[str, str]:
        """Of each queue with acknowledgements, the end of its records in `unacked`."""
        return self._record_endings

    @property
    def record_keys(self) -> tuple[str, str]:
        """Of the messages that are not acknowledged, and of their index."""
        return self.global_keyprefix + self.unacked_key, self.global_keyprefix + self.unacked_index_key

    @property
    def acknowledges(self) -> bool:
        """Whether this channel consumes queues with acknowledgements."""
        return bool(self._record_endings)

    def delay(self, tag: str, at: float, id: str) -> DueJob:
        """Have the message that is being delivered wait in Redis until `at`, in unix seconds."""
        assert self._reserved is not None
        # Not all messages at one time: see worker/queue/due.py.
        at += random.random() / 1_000  # noqa: S311 - spread
        job = DueJob(id, self._due_key(self._reserved.list), at)
        self.qos.delay(tag, DelayedMessage(job.key, at, len(self._reserved.ending), id))
        return job

    def _due_key(self, name: str) -> str:
        prefix: str = self.global_keyprefix
        return prefix + DUE.named(prefix + name)

    def deliver_early(self, job: DueJob) -> None:
        """Deliver a job of a consumed queue before its time, unless another worker has taken it."""
        queues = set(self._record_endings).intersection(self.active_queues)
        request = reserve_request(queues, self.priority_steps, self._separators, self._record_endings)
        numbers = {self._due_key(name): number for number, name in enumerate(request.lists)}
        number = numbers.get(job.key)
        if number is None:
            return
        keys = [*self.record_keys, self.global_keyprefix + DUE_IDS.pattern, job.key]
        arguments = [request.tag, repr(job.score), job.id, request.endings[number]]
        try:
            with self.conn_or_acquire() as client:
                reply = client.execute_command("EVAL", RESERVE_EARLY, len(keys), *keys, *arguments)
        except (*self.connection_errors, ResponseError) as error:
            # The server may have run the script.
            self.pending_acks.requeue(request.tag)
            self.backoff.complain(error)
            return
        reserved = request.reserved((number, *reply)) if reply else None
        if reserved:
            with contextlib.suppress(Empty):
                self._deliver_reserved(reserved)

    def basic_consume(self, queue: str, *args: Any, **options: Any) -> Any:
        no_ack = options["no_ack"] if "no_ack" in options else args[0]
        if no_ack or not self.ack_emulation or queue in self._fanout_queues:
            self._record_endings.pop(queue, None)
        else:
            self._record_endings[queue] = record_ending(queue)
            with self.conn_or_acquire() as client:
                check_may_reserve(client, self.record_keys, self.global_keyprefix, self.backoff)
                self._separators = readable_separators(
                    client, self.sep, self._record_endings, self.priority_steps[-1], self.backoff
                )
        return super().basic_consume(queue, *args, **options)

    def close(self) -> None:
        if self._in_poll:
            # A reserve is in flight, and its message would no longer find a consumer.
            assert self._request is not None
            tag = self._request.tag
            with contextlib.suppress(Empty, *self.connection_errors):
                self._read_reply()
            self.pending_acks.requeue(tag)
        # Without ack emulation, as in a monitor, the QoS is one of kombu's.
        if self.ack_emulation:
            self.qos.flush_if_possible()
        super().close()

    # Reserving

    def _brpop_start(self, timeout: float | None = None) -> None:
        if not self.backoff.is_over:
            return
        try:
            if self.ack_emulation:
                self.qos.flush_unless_scheduled()
            if not self._record_endings or self.can_accept():
                self._send_request()
        except ResponseError as error:
            # Redis refused a pending ack, or PING, the connection's health check.
            self._in_poll = self._request = None
            self.backoff.refused(error)

    def _send_request(self) -> None:
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        self._request = reserve_request(queues, self.priority_steps, self._separators, self._record_endings)
        arguments = self._request.arguments(self.record_keys, self.global_keyprefix)
        command = ("EVALSHA", RESERVE_SHA) if self._is_script_cached else ("EVAL", RESERVE)
        self._in_poll = self.client.connection
        self._brpop_sent_at = time.monotonic()
        self.client.connection.send_command(*command, *arguments)

    def _brpop_read(self, **options: Any) -> bool:
        request = self._request
        if request is None:
            # No reply is expected: the server closed an idle connection. The next reserve opens another.
            self.client.connection.disconnect()
            raise Empty
        reply = self._read_reply(**options)
        if reply is None:
            self.backoff.pause_until(self._brpop_sent_at + POLL_S / 2)
            raise Empty
        reserved = request.reserved(reply)
        if reserved is None:
            raise Empty
        if reserved.tag:
            self._check_stale(reserved.tag)
        self._deliver_reserved(reserved)
        return True

    def _read_reply(self, **options: Any) -> Any:
        """The script's reply; raises Empty where it was refused."""
        try:
            reply = self.client.parse_response(self.client.connection, "EVALSHA", **options)
            self._is_script_cached = True
            return reply
        except NoScriptError:
            self._is_script_cached = False
            raise Empty from None
        except self.connection_errors:
            self.client.connection.disconnect()
            raise
        except ResponseError as error:
            if is_demoted(error):
                # After a failover the host's name may lead to another server.
                self.client.connection.disconnect()
            self.backoff.refused(error)
            raise Empty from None
        finally:
            self._in_poll = self._request = None
            self._flush_brpop_reauth()

    def _check_stale(self, tag: str) -> None:
        """Raises Empty where the message has gone back to its queue since it was taken."""
        if time.monotonic() - self._brpop_sent_at < STALE_REPLY_S:
            return
        try:
            with self.conn_or_acquire() as client:
                is_ours = client.hget(self.unacked_key, tag) is not None
        except (*self.connection_errors, ResponseError) as error:
            self.pending_acks.requeue(tag)
            self.backoff.refused(error)
            raise Empty from error
        if not is_ours:
            logger.warning("A message was taken too long ago: it has gone back to its queue.")
            raise Empty

    def _on_connection_disconnect(self, connection: Any) -> None:
        if self._request is not None and self._in_poll is connection:
            # The server may have run the script, or may yet run it.
            self.pending_acks.requeue(self._request.tag)
            self._request = None
        super()._on_connection_disconnect(connection)


class SentinelChannel(Channel, stock.SentinelChannel):  # type: ignore[misc]
    """The same behind Sentinel."""

    @staticmethod
    def broker_identity(connection: Any) -> str:
        # All sentinels lead to the same broker, so the current one does not matter.
        return ";".join(sorted(connection.alt)) or Channel.broker_identity(connection)


class Transport(stock.Transport):  # type: ignore[misc]
    """Kombu's, with our channel, and an event loop that runs often enough."""

    Channel = Channel
    on_refused = staticmethod(log_refused)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.cycle = Poller()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        super().register_with_event_loop(connection, loop)
        # Celery cancels it with the connection.
        loop.call_repeatedly(POLL_S, _wake)
        timeout = connection.client.transport_options.get("visibility_timeout", Channel.visibility_timeout)
        loop.call_repeatedly(max(MIN_EXTEND_S, min(MAX_EXTEND_S, timeout / 4)), self.cycle.extend)


def _wake() -> None:
    """Do nothing: the call wakes the event loop, which then sends a reserve."""


class SentinelTransport(Transport, stock.SentinelTransport):  # type: ignore[misc]
    """The same behind Sentinel."""

    Channel = SentinelChannel
