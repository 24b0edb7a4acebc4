"""Kombu's Redis transport with an atomic take: a message is in its queue or in `unacked`, never in between.

Stock kombu takes with BRPOP and writes to `unacked` afterwards: a worker that dies between the two loses the message.
Here one Lua script does both. It cannot block, so the event loop asks every `POLL_S` seconds. Everything else is
kombu's, its keys and their form too: stock consumers and producers may share the broker.

What this process could not tell its broker (acknowledgements, messages to give back) it keeps and tells it later.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import Empty
from typing import Any

from celery.exceptions import ImproperlyConfigured
from kombu import transport
from kombu.asynchronous import get_event_loop
from kombu.transport import redis as stock
from kombu.transport import virtual
from kombu.utils.json import dumps
from kombu.utils.uuid import uuid
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, NoScriptError, ResponseError

from tasks.availability import is_away, is_demoted
from tasks.redis_keys import GUIDES_SEPARATOR, SEPARATOR, list_name
from tasks.routing import priority_for
from worker.queue.due import DUE, ETA, HOLD
from worker.queue.envelope import MAX_DELAY_S, NO_ENVELOPE, Refused, given_back, opened, returned_job, usable_id
from worker.queue.redeliveries import DELIVERIES, kept_s

logger = logging.getLogger(__name__)

#: Seconds between two takes while the queues are empty.
POLL_S = 0.03
#: Seconds without a take after the broker refused one.
REFUSED_S = 1.0
#: Seconds between two lines of the log about refusals.
COMPLAIN_S = 30.0
#: Seconds within which jobs that end are acknowledged together. A worker that dies before has them come again, and
#: finds that they have ended.
SETTLE_S = 0.03
#: Messages, and their bytes, that one take puts where they wait for their time: no script is to hold Redis up.
MOST_HELD = 100
MOST_HELD_BYTES = 1_000_000
#: Seconds after which a reply is late: another worker may have been given its message meanwhile.
LATE_S = 5.0
#: Seconds between two looks for messages whose visibility timeout is over, without an event loop.
SWEEP_S = 0.5
#: Seconds after which a worker says again that it has its messages: a quarter of the visibility timeout, within these.
EXTEND_LEAST_S, EXTEND_MOST_S = 0.25, 10.0

#: KEYS: unacked, its index, then the lists in order. ARGV: tag, what stands before a list's name in the name of its
#: set of messages that wait for their time (worker/queue/due.py), then for each list what ends the record of its
#: messages; empty where they are not acknowledged. Answers with the list's number, the message, the server's time; the
#: number is -1 where it met so many messages before their time that it is to be asked again.
#: RPOP or ZREM comes first: a full server allows what follows a write that frees memory. Lua does not roll back.
#: All times are the server's: a worker's clock may be hours ahead.
TAKE = f"""
{ETA}
local function failed(reply) return type(reply) == 'table' and reply.err end
local time = redis.call('TIME')
local now = string.format('%d.%06d', time[1], time[2])
local met, bytes = 0, 0
for i = 3, #KEYS do
  local due, raw, at
  if ARGV[i] ~= '' then
    due = ARGV[2] .. KEYS[i]
    local first = redis.pcall('ZRANGEBYSCORE', due, '-inf', now, 'WITHSCORES', 'LIMIT', 0, 1)
    raw, at = first[1], first[2]
  end
  if raw then redis.call('ZREM', due, raw) else raw = redis.call('RPOP', KEYS[i]) end
  while due and raw and not at do
    local moment = eta(raw)
    if not moment or moment <= tonumber(now) or moment > time[1] + {MAX_DELAY_S} then break end
    local reply = redis.pcall('ZADD', due, string.format('%.6f', moment), raw)
    if failed(reply) then
      redis.call('RPUSH', KEYS[i], raw)
      return reply
    end
    met, bytes = met + 1, bytes + #raw
    if met >= {MOST_HELD} or bytes >= {MOST_HELD_BYTES} then return {{-1, '', now}} end
    raw = redis.call('RPOP', KEYS[i])
  end
  if raw then
    if due and string.byte(raw) == 123 then
      local reply = redis.pcall('HSET', KEYS[1], ARGV[1], '[' .. raw .. ARGV[i])
      if not failed(reply) then reply = redis.pcall('ZADD', KEYS[2], now, ARGV[1]) end
      if failed(reply) then
        redis.pcall('HDEL', KEYS[1], ARGV[1])
        if at then redis.call('ZADD', due, at, raw) else redis.call('RPUSH', KEYS[i], raw) end
        return reply
      end
    end
    return {{i - 3, raw, now}}
  end
end
return false
"""
#: KEYS: unacked, its index, the list. ARGV: tag, what ends the record. 0 where it is of another form. The list's end is
#: read next. Deleted first, for a full server.
HAND_BACK = """
local record = redis.call('HGET', KEYS[1], ARGV[1])
if record and string.sub(record, -#ARGV[2]) ~= ARGV[2] then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
if record then
  local reply = redis.pcall('RPUSH', KEYS[3], string.sub(record, 2, -#ARGV[2] - 1))
  if type(reply) == 'table' and reply.err then
    redis.call('HSET', KEYS[1], ARGV[1], record)
    return reply
  end
end
redis.call('ZREM', KEYS[2], ARGV[1])
return 1
"""
TAKE_SHA = hashlib.sha1(TAKE.encode(), usedforsecurity=False).hexdigest()


#: Says that messages are still held. KEYS: the index. ARGV: their tags. What has gone back to its queue stays there.
#: A full server allows what follows a write that frees memory.
EXTEND = """
local time = redis.call('TIME')
local now = string.format('%d.%06d', time[1], time[2])
for _, tag in ipairs(ARGV) do
  if redis.call('ZREM', KEYS[1], tag) == 1 then redis.call('ZADD', KEYS[1], now, tag) end
end
return now
"""


class _NotKept(Exception):
    """There is no place for a message that is to be dropped."""


def _forget(raw: bytes, refused: Refused) -> None:
    logger.critical("A message of %d bytes is dropped. %s", len(raw), refused)


#: Called with each message that is dropped because it cannot be read, before it is.
_on_refused: Callable[[bytes, Refused], None] = _forget


def use(on_refused: Callable[[bytes, Refused], None] = _forget, *, atomic: bool = True) -> None:
    """From now on this process's Redis connections take atomically, or as kombu's own where the broker runs no scripts.

    Both count what comes back from workers that are lost.
    """
    global _on_refused
    _on_refused = on_refused
    # By alias: a broker_transport of our own would be forgotten at the fail-over to another URL.
    names = {"redis": "Transport", "rediss": "Transport", "sentinel": "SentinelTransport"}
    for alias, name in names.items():
        transport.TRANSPORT_ALIASES[alias] = f"{__name__}:{'' if atomic else 'Plain'}{name}"
        transport._transport_cache.pop(alias, None)


@dataclass(frozen=True, slots=True)
class Take:
    """A request for one message. The tag names the message from the moment that it leaves its queue."""

    tag: str
    #: Of each list, in order.
    queues: tuple[str, ...]
    #: Without the prefix of all keys.
    lists: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Hold:
    """A message that is to wait for its time."""

    #: The sorted set.
    key: str
    #: Unix seconds.
    at: float
    #: Bytes that end its record.
    ending: int


class Debts:
    """Tags that this process owes its broker an answer for."""

    def __init__(self) -> None:
        #: The job whose returns are forgotten with each: one that had come back.
        self.acks: dict[str, str | None] = {}
        #: Whether each goes to the end of its queue.
        self.returns: dict[str, bool] = {}
        self.holds: dict[str, Hold] = {}
        #: Messages to be put back as they came, as if nobody had taken them.
        self.unbegun: dict[str, Unbegun] = {}

    def ack(self, tag: str, id: str | None = None) -> None:
        self.returns.pop(tag, None)
        self.unbegun.pop(tag, None)
        self.acks[tag] = id

    def give_back(self, tag: str, *, last: bool = False) -> None:
        if tag not in self.acks and tag not in self.holds and tag not in self.unbegun:
            self.returns[tag] = last


@dataclass(frozen=True, slots=True)
class Unbegun:
    """Where a message came from: its list, and how its record ends."""

    list: str
    end: str


#: By the broker's URL, the prefix of its keys and that of `unacked`: a channel that lost its connection leaves them to
#: the next one.
_debts: defaultdict[tuple[str, str, str], Debts] = defaultdict(Debts)


def owes() -> bool:
    """Whether any broker waits for an answer of this process. By any thread."""
    return any(debts.acks or debts.returns or debts.holds or debts.unbegun for debts in list(_debts.values()))


class SweepingQoS(stock.QoS):  # type: ignore[misc]
    """Kombu's, which counts what comes back from holders that are silent, and bears records that cannot be read."""

    def restore_visible(self, start: int = 0, num: int | None = 10, interval: int = 10) -> None:
        """Kombu's, by the server's clock. What comes back here had a holder that died, froze or was cut off."""
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
        """Kombu's, which lets what it cannot read end each worker that comes by, or drops it."""

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
        """Answers with the message, or with nothing where it was refused."""
        try:
            message, exchange, routing_key = given_back(record)
            raw = dumps(message)
        except Refused as refused:
            self._keep_refused(record, refused)
            return {}
        except Exception:
            self._keep_refused(record, Refused(NO_ENVELOPE))
            return {}
        for queue in self.channel._lookup(exchange, routing_key):
            push(self.channel._q_for_pri(queue, self._priority(message)), raw)
        return message

    def _count_return(self, message: dict[str, Any], pipe: Any) -> None:
        key = returned_job(message)
        if key is not None:
            # Kombu's client prefixes the keys of some commands only, and these are not among them.
            name = f"{self.channel.global_keyprefix}{DELIVERIES}{key[0]}"
            pipe.hincrby(name, str(key[1]), 1).expire(name, kept_s(self.channel))

    def _keep_refused(self, record: bytes, refused: Refused) -> None:
        """Raises _NotKept, upon which the record stays where it is: the sweep finds it."""
        try:
            _on_refused(record, refused)
        except Exception as error:
            self.channel._complain(error)
            raise _NotKept from error

    def _priority(self, message: dict[str, Any]) -> int:
        try:
            return int(self.channel._get_message_priority(message, reverse=False))
        except ArithmeticError:
            # Of an infinite one.
            return int(self.channel.default_priority)


class QoS(SweepingQoS):
    """Kombu's, for messages that are recorded when they are taken, and for brokers that refuse or are away."""

    def append(self, message: Any, delivery_tag: str) -> None:
        if delivery_tag == self.channel.recorded:
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        self.channel.debts.ack(delivery_tag, _returned_job(self._delivered.get(delivery_tag)))
        self.channel.settle_soon()
        virtual.QoS.ack(self, delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if not requeue:
            self.ack(delivery_tag)
            return
        self.channel.debts.give_back(delivery_tag, last=True)
        self.channel.settle_if_possible()
        virtual.QoS.ack(self, delivery_tag)

    def hand_back(self, message: Any) -> None:
        """Put a message back where it came from, to be read next. It is not marked as redelivered: it was not begun."""
        tag, channel = message.delivery_tag, self.channel
        queue = message.delivery_info.get("routing_key")
        if queue in channel.record_ends:
            priority = self._priority({"properties": message.properties})
            channel.debts.unbegun[tag] = Unbegun(channel._q_for_pri(queue, priority), channel.record_ends[queue])
        else:
            channel.debts.give_back(tag)
        channel.settle_soon()
        virtual.QoS.ack(self, tag)

    def put_back(self, unbegun: dict[str, Unbegun]) -> None:
        prefix = self.channel.global_keyprefix
        with self.channel.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
            for tag, origin in unbegun.items():
                keys = [prefix + key for key in (self.unacked_key, self.unacked_index_key, origin.list)]
                pipe.execute_command("EVAL", HAND_BACK, len(keys), *keys, tag, origin.end)
            known = pipe.execute()
        for tag, is_known in zip(unbegun, known, strict=True):
            if not is_known:
                self.restore_by_tag(tag)

    def restore_unacked(self, client: Any = None) -> None:
        # Given back to the end that is read next: in this order the oldest is read first.
        for tag in reversed(self._delivered):
            self.channel.debts.give_back(tag)
        self._delivered.clear()
        self.channel.settle_if_possible()

    def extend(self) -> None:
        """Tell the broker that this process lives, and has its messages."""
        debts = self.channel.debts
        tags = {*(self._delivered.keys() - self._dirty), *debts.acks, *debts.holds}
        with self.channel.conn_or_acquire() as redis:
            redis.execute_command("EVAL", EXTEND, 1, self.channel.record_keys[1], *tags)

    def remove(self, acks: dict[str, str | None]) -> None:
        """Forget messages, and the returns of their jobs."""
        names = [DELIVERIES + id for id in acks.values() if id]
        with self.pipe_or_acquire() as pipe:
            pipe.zrem(self.unacked_index_key, *acks).hdel(self.unacked_key, *acks)
            if names:
                pipe.delete(*names)
            pipe.execute()


def _returned_job(message: Any) -> str | None:
    """The id in a message that says that it came back."""
    if message is None or not message.delivery_info.get("redelivered") or not isinstance(message.headers, dict):
        return None
    return usable_id(message.headers.get("id"))


class Channel(stock.Channel):  # type: ignore[misc]
    """Kombu's, with the atomic take. The methods named after BRPOP are those that kombu's poller calls."""

    QoS = QoS

    #: The connection that a take is in flight on.
    _in_poll: Any = None

    def __init__(self, connection: Any, **options: Any) -> None:
        #: The tag of the message that is being delivered, where its take has recorded it.
        self.recorded: str | None = None
        #: Of each queue with acknowledgements, how its records end: the default exchange and the queue's name, so that
        #: a message that comes back needs no binding.
        self._ends: dict[str, str] = {}
        #: When the message that is being delivered was taken, in unix seconds of the server's clock.
        self.taken_at = 0.0
        #: The list that it was taken from, and how its record ends.
        self._taken_from = "", ""
        #: Whether to ask for such messages now.
        self.wants: Callable[[], bool] = lambda: True
        #: How far a compressed body is inflated.
        self.most_bytes = 32_000_000
        #: Of producers whose options have another one than ours.
        self._other_separators: list[str] = []
        self._take: Take | None = None
        self._command_client: Any = None
        self._settles_soon = False
        self._knows_script = True
        self._rests_until = 0.0
        self._complained_at = float("-inf")
        try:
            super().__init__(connection, **options)
        except ResponseError as error:
            # Such a server refuses even PING. As a connection error it is tried again, with growing pauses.
            if is_away(error):
                raise RedisConnectionError(str(error)) from error
            raise
        self.debts = _debts[self._place(connection.client), self.global_keyprefix, self.unacked_key]

    @property
    def record_ends(self) -> Mapping[str, str]:
        """Of each queue with acknowledgements, how its records end."""
        return self._ends

    @staticmethod
    def _place(connection: Any) -> str:
        """Tells one broker from another."""
        return str(connection.as_uri())

    def basic_consume(self, queue: str, *args: Any, **options: Any) -> Any:
        no_ack = options["no_ack"] if "no_ack" in options else args[0]
        if no_ack or not self.ack_emulation or queue in self._fanout_queues:
            self._ends.pop(queue, None)
        else:
            self._ends[queue] = f', "", {dumps(queue)}]'
            self._check_script()
            others = dict.fromkeys((SEPARATOR, GUIDES_SEPARATOR))
            self._other_separators = [sep for sep in others if sep != self.sep and self._may_read(sep)]
        return super().basic_consume(queue, *args, **options)

    def close(self) -> None:
        if self._in_poll:
            # Its message would find its consumer gone.
            assert self._take is not None
            tag = self._take.tag
            with contextlib.suppress(Empty, *self.connection_errors):
                self._read_reply()
            self.debts.give_back(tag)
        self.settle_if_possible()
        super().close()

    def _create_client(self, asynchronous: bool = False) -> Any:
        if asynchronous:
            return super()._create_client(asynchronous)
        # Kombu makes a client for every command, which costs more than the command.
        if self._command_client is None or self._command_client.connection_pool is not self.pool:
            self._command_client = super()._create_client()
        return self._command_client

    # Taking

    def _check_script(self) -> None:
        """Raises ImproperlyConfigured where the broker's user may run no script."""
        try:
            with self.conn_or_acquire() as client:
                client.execute_command("EVAL", TAKE, *self._script_arguments(Take(uuid(), (), ())))
        except NoPermissionError as error:
            raise ImproperlyConfigured(
                f"The broker's user may not run scripts ({error}): add +eval +evalsha +rpop to its ACL, "
                "or set IDEFICS_ATOMIC_TAKE=false and lose a job whenever a worker dies while it takes it."
            ) from error
        except ResponseError as error:
            self._complain(error)

    def _brpop_start(self, timeout: float | None = None) -> None:
        if time.monotonic() < self._rests_until:
            return
        try:
            if not self._settles_soon:
                self.settle()
            if not self._ends or self.wants():
                self._send_take()
        except ResponseError as error:
            # A debt, or the connection's health check: PING.
            self._in_poll = self._take = None
            self._refused(error)

    def _send_take(self) -> None:
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        lists = [(queue, name) for step in self.priority_steps for queue in queues for name in self._lists(queue, step)]
        self._take = Take(uuid(), tuple(queue for queue, _ in lists), tuple(name for _, name in lists))
        arguments = self._script_arguments(self._take)
        command = ("EVALSHA", TAKE_SHA) if self._knows_script else ("EVAL", TAKE)
        self._in_poll = self.client.connection
        self._brpop_sent_at = time.monotonic()
        self.client.connection.send_command(*command, *arguments)

    def _lists(self, queue: str, step: int) -> list[str]:
        """A queue's lists for a priority: our own, and those of producers with other separators."""
        own = self._q_for_pri(queue, step)
        return [own, *(list_name(queue, step, sep) for sep in self._other_separators)] if step else [own]

    def _may_read(self, separator: str) -> bool:
        """Whether the broker's user may read such lists: its rights may name the queues of kombu's separator alone."""
        step = self.priority_steps[-1]
        try:
            with self.conn_or_acquire() as client:
                for queue in self._ends:
                    client.llen(list_name(queue, step, separator))
        except NoPermissionError:
            logger.info("The broker's user may not read lists with the separator %r: they are left alone.", separator)
            return False
        except ResponseError as error:
            self._complain(error)
        return True

    def _script_arguments(self, take: Take) -> list[Any]:
        keys = [*self.record_keys, *(self.global_keyprefix + name for name in take.lists)]
        ends = [self._ends.get(queue, "") for queue in take.queues]
        return [len(keys), *keys, take.tag, self.global_keyprefix + DUE, *ends]

    @property
    def record_keys(self) -> tuple[str, str]:
        """Of messages that are not acknowledged, and of their index."""
        return self.global_keyprefix + self.unacked_key, self.global_keyprefix + self.unacked_index_key

    def _brpop_read(self, **options: Any) -> bool:
        take = self._take
        if take is None:
            # Nothing is expected: the server closed an idle connection. The next take opens another.
            self.client.connection.disconnect()
            raise Empty
        reply = self._read_reply(**options)
        if reply is None:
            self._rests_until = self._brpop_sent_at + POLL_S / 2
            raise Empty
        number, raw, now = reply
        if number < 0:
            raise Empty
        queue, self.taken_at = take.queues[number], float(now)
        self._taken_from = take.lists[number], self._ends.get(queue, "")
        self.recorded = take.tag if queue in self._ends and raw[:1] == b"{" else None
        if self.recorded:
            self._check_late(take.tag)
        message = self._parse(queue, raw)
        self._queue_cycle.rotate(queue)
        try:
            self.connection._deliver(message, queue)
        except self.connection_errors:
            raise
        except Exception:
            # A defect of ours is not its sender's fault. A second one with the same message would loop.
            logger.exception("A defect while a message of queue %s was taken in.", queue)
            if not self.recorded:
                pass
            elif message["properties"]["delivery_info"].get("redelivered"):
                self._drop(raw, Refused("The worker has a defect: its log has the traceback."))
            else:
                self.qos.reject(self.recorded, requeue=True)
        return True

    def _read_reply(self, **options: Any) -> Any:
        """The script's reply; raises Empty where it was refused."""
        try:
            reply = self.client.parse_response(self.client.connection, "EVALSHA", **options)
            self._knows_script = True
            return reply
        except NoScriptError:
            self._knows_script = False
            raise Empty from None
        except self.connection_errors:
            self.client.connection.disconnect()
            raise
        except ResponseError as error:
            if is_demoted(error):
                # Its name may stand for another server by now.
                self.client.connection.disconnect()
            self._refused(error)
            raise Empty from None
        finally:
            self._in_poll = self._take = None
            self._flush_brpop_reauth()

    def _check_late(self, tag: str) -> None:
        """Raises Empty where the message has gone back to its queue since it was taken."""
        if time.monotonic() - self._brpop_sent_at < LATE_S:
            return
        try:
            with self.conn_or_acquire() as client:
                is_ours = client.hget(self.unacked_key, tag) is not None
        except (*self.connection_errors, ResponseError) as error:
            self.debts.give_back(tag)
            self._refused(error)
            raise Empty from error
        if not is_ours:
            logger.warning("A message was taken too long ago: it has gone back to its queue.")
            raise Empty

    def _parse(self, queue: str, raw: bytes) -> dict[str, Any]:
        """Raises Empty for what is no message."""
        try:
            message = opened(raw, queue, self.most_bytes)
        except Refused as refused:
            try:
                self._drop(raw, refused)
            except Exception as error:
                # Nothing is lost for want of a place to say so.
                self._complain(error)
                if self.recorded:
                    self.debts.give_back(self.recorded, last=True)
            raise Empty from None
        if self.recorded:
            message["properties"]["delivery_tag"] = self.recorded
        return message

    def _drop(self, raw: bytes, refused: Refused) -> None:
        _on_refused(raw, refused)
        if self.recorded:
            self.qos.ack(self.recorded)

    def _receive_one(self, client: Any) -> Any:
        """Kombu's, for a message on a channel that everybody listens to."""
        try:
            return super()._receive_one(client)
        except (Empty, ResponseError, *self.connection_errors):
            raise
        except Exception as error:
            logger.error("What came on a channel of Redis cannot be read (%s); it is dropped.", type(error).__name__)
            raise Empty from None

    def _refused(self, error: Exception) -> None:
        self._rests_until = time.monotonic() + REFUSED_S
        self._complain(error)

    def _complain(self, error: Exception) -> None:
        now = time.monotonic()
        if now - self._complained_at >= COMPLAIN_S:
            self._complained_at = now
            logger.error("The broker refuses or is away (%s): it is asked again.", error)

    def _on_connection_disconnect(self, connection: Any) -> None:
        if self._take is not None and self._in_poll is connection:
            # The server may have run the script, or run it yet.
            self.debts.give_back(self._take.tag)
            self._take = None
        super()._on_connection_disconnect(connection)

    @property
    def acknowledges(self) -> bool:
        """Whether messages were taken here that count as held until they are acknowledged."""
        return bool(self._ends)

    def hold(self, tag: str, at: float) -> None:
        """Have the message that is being delivered wait in Redis until a time, in unix seconds."""
        (name, ending), prefix = self._taken_from, self.global_keyprefix
        self.debts.holds[tag] = Hold(f"{prefix}{DUE}{prefix}{name}", at, len(ending))
        self.settle_soon()
        virtual.QoS.ack(self.qos, tag)

    # Debts

    def settle(self) -> None:
        """Tell the broker what it does not know yet. Raises where it cannot be told."""
        acks = dict(self.debts.acks)
        if acks:
            self.qos.remove(acks)
        for tag in acks:
            self.debts.acks.pop(tag, None)
        if self.debts.unbegun:
            unbegun, self.debts.unbegun = self.debts.unbegun, {}
            try:
                self.qos.put_back(unbegun)
            except Exception:
                # To hand one back twice does nothing.
                self.debts.unbegun = unbegun | self.debts.unbegun
                raise
        self._settle_holds()
        for tag, last in list(self.debts.returns.items()):
            self.qos.restore_by_tag(tag, leftmost=last)
            self.debts.returns.pop(tag, None)

    def _settle_holds(self) -> None:
        while chunk := list(itertools.islice(self.debts.holds.items(), MOST_HELD)):
            keys = [*self.record_keys, *(hold.key for _, hold in chunk)]
            arguments = [part for tag, hold in chunk for part in (tag, hold.at, hold.ending)]
            with self.conn_or_acquire() as client:
                client.execute_command("EVAL", HOLD, len(keys), *keys, *arguments)
            for tag, _ in chunk:
                self.debts.holds.pop(tag, None)

    def settle_soon(self) -> None:
        """Together with what ends within SETTLE_S, where there is an event loop."""
        hub = get_event_loop()
        if hub is None:
            self.settle_if_possible()
        elif not self._settles_soon:
            self._settles_soon = True
            hub.call_later(SETTLE_S, self._settle_now)

    def _settle_now(self) -> None:
        self._settles_soon = False
        self.settle_if_possible()

    def settle_if_possible(self) -> None:
        if self.closed and self.connection is None:
            return
        try:
            self.settle()
        except (*self.connection_errors, ResponseError) as error:
            self._complain(error)

    def _get_message_priority(self, message: Any, *args: Any, **options: Any) -> int:
        """Kombu's. The messages of other apps' dead workers come back through here, too."""
        priority: int = super()._get_message_priority(message, *args, **options)
        headers = message.get("headers")
        task = headers.get("task") if isinstance(headers, dict) else None
        return int(priority_for(task, priority)) if task is not None else priority

    # What a full server refuses

    def _queue_bind(self, *args: Any) -> None:
        try:
            super()._queue_bind(*args)
        except ResponseError as error:
            # A worker that starts beside a full server has to empty it, and needs no binding for that.
            if not is_away(error):
                raise
            self._complain(error)


class SentinelChannel(Channel, stock.SentinelChannel):  # type: ignore[misc]
    """The same behind Sentinel."""

    @staticmethod
    def _place(connection: Any) -> str:
        # Whichever of its sentinels is asked now, they lead to one broker.
        return ";".join(sorted(connection.alt)) or Channel._place(connection)


class Poller(stock.MultiChannelPoller):  # type: ignore[misc]
    """Kombu's, with waits that are short enough for the next take."""

    def __init__(self) -> None:
        super().__init__()
        self._swept_at = float("-inf")
        self._extended_at = time.monotonic()

    def get(self, callback: Any, timeout: float | None = None) -> Any:
        return super().get(callback, POLL_S if timeout is None else min(timeout, POLL_S))

    def maybe_restore_messages(self) -> Any:
        # `get` asks after each of its waits.
        now = time.monotonic()
        if now - self._swept_at < SWEEP_S:
            return None
        self._swept_at = now
        stood_still = now - self._extended_at
        self.extend()
        if any(stood_still > channel.visibility_timeout / 2 for channel in self._holders):
            # The broker hung, or this process: other workers, too, must first say that they are there.
            return None
        return super().maybe_restore_messages()

    def on_poll_init(self, poller: Any) -> None:
        # Kombu looks for lost messages here: after an outage, before others could say that they hold theirs.
        self.poller = poller
        self._extended_at = time.monotonic()

    @property
    def _holders(self) -> list[Any]:
        return [channel for channel in self._channels if channel.acknowledges]

    def extend(self) -> None:
        """Say of all messages that are held here that they are."""
        for channel in self._holders:
            try:
                channel.qos.extend()
            except (*channel.connection_errors, ResponseError) as error:
                channel._complain(error)
                return
        self._extended_at = time.monotonic()


class Transport(stock.Transport):  # type: ignore[misc]
    """Kombu's, with our channel, and an event loop that turns often enough."""

    Channel = Channel

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.cycle = Poller()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        super().register_with_event_loop(connection, loop)
        # Celery cancels it with the connection.
        loop.call_repeatedly(POLL_S, _wake)
        timeout = connection.client.transport_options.get("visibility_timeout", Channel.visibility_timeout)
        loop.call_repeatedly(max(EXTEND_LEAST_S, min(EXTEND_MOST_S, timeout / 4)), self.cycle.extend)


def _wake() -> None:
    """The event loop takes at each of its turns: this gives it one."""


class SentinelTransport(Transport, stock.SentinelTransport):  # type: ignore[misc]
    """The same behind Sentinel."""

    Channel = SentinelChannel


# Where the broker runs no scripts


class PlainQoS(SweepingQoS):
    """Kombu's, and a job's returns are forgotten with its message."""

    def ack(self, delivery_tag: str) -> None:
        self._forget_returns(delivery_tag)
        super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if not requeue:
            self._forget_returns(delivery_tag)
        super().reject(delivery_tag, requeue)

    def _forget_returns(self, tag: str) -> None:
        id = _returned_job(self._delivered.get(tag))
        if id is not None:
            with self.channel.conn_or_acquire() as redis:
                redis.delete(DELIVERIES + id)


class PlainChannel(stock.Channel):  # type: ignore[misc]
    """Kombu's own, but for what is swept."""

    QoS = PlainQoS

    def _complain(self, error: Exception) -> None:
        logger.error("The broker refuses or is away (%s): it is asked again.", error)


class PlainSentinelChannel(PlainChannel, stock.SentinelChannel):  # type: ignore[misc]
    """The same behind Sentinel."""


class PlainTransport(stock.Transport):  # type: ignore[misc]
    """Kombu's, with that channel."""

    Channel = PlainChannel


class PlainSentinelTransport(stock.SentinelTransport):  # type: ignore[misc]
    """The same behind Sentinel."""

    Channel = PlainSentinelChannel
