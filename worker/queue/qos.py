"""Acknowledges and requeues messages. Those that Redis refuses, or that come while it is away, are sent again later.

They are kept in `pending_acks.py` until then. `reserve.py` recorded the messages in `unacked` when it took them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kombu.asynchronous import get_event_loop
from kombu.transport import virtual
from redis.exceptions import ResponseError

from tasks.redis_keys import DUE_IDS, REDELIVERIES
from worker.queue.due import DELAY
from worker.queue.pending_acks import ACK_BATCH_WINDOW_S, DelayedMessage, Origin
from worker.queue.visibility_timeout import RestoringQoS, redelivered_id

#: Puts a message back to its list byte for byte. KEYS: unacked, its index, the list. ARGV: tag, the end of the record.
#: Returns 0 where the record is of another form. The list's end is read next. Deleted first, for a full server.
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
#: Renews the claims on held messages. KEYS: the index. ARGV: their tags. A message that has returned to its queue stays
#: there.
#: A full server allows what follows a write that frees memory.
EXTEND = """
local time = redis.call('TIME')
local now = string.format('%d.%06d', time[1], time[2])
for _, tag in ipairs(ARGV) do
  if redis.call('ZREM', KEYS[1], tag) == 1 then redis.call('ZADD', KEYS[1], now, tag) end
end
return now
"""


class QoS(RestoringQoS):
    """Kombu's; acks and requeues are pending until the broker has them, and are sent in batches."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._is_flush_scheduled = False

    def can_consume(self) -> bool:
        """Kombu's, without the messages of jobs that wait elsewhere than in the pool's places."""
        held = len(self._delivered) - len(self._dirty) - self.channel.parked()
        return not self.prefetch_count or held < self.prefetch_count

    def append(self, message: Any, delivery_tag: str) -> None:
        if delivery_tag == self.channel.recorded:
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        self.channel.pending_acks.ack(delivery_tag, redelivered_id(self._delivered.get(delivery_tag)))
        self._flush_soon()
        virtual.QoS.ack(self, delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if not requeue:
            self.ack(delivery_tag)
            return
        self.channel.pending_acks.requeue(delivery_tag, last=True)
        self.flush_if_possible()
        virtual.QoS.ack(self, delivery_tag)

    def hand_back(self, message: Any) -> None:
        """Put a message back where it came from, to be read next, and not marked as redelivered."""
        tag, channel = message.delivery_tag, self.channel
        queue = message.delivery_info.get("routing_key")
        if queue in channel.record_endings:
            priority = self.priority_of({"properties": message.properties})
            origin = Origin(channel._q_for_pri(queue, priority), channel.record_endings[queue])
            channel.pending_acks.hand_backs[tag] = origin
        else:
            channel.pending_acks.requeue(tag)
        self._flush_soon()
        virtual.QoS.ack(self, tag)

    def delay(self, tag: str, delayed: DelayedMessage) -> None:
        """Have a message wait in Redis for its time."""
        self.channel.pending_acks.delayed[tag] = delayed
        self._flush_soon()
        virtual.QoS.ack(self, tag)

    def restore_unacked(self, client: Any = None) -> None:
        # Requeued at the end that is read next: in this order the oldest is read first.
        for tag in reversed(self._delivered):
            self.channel.pending_acks.requeue(tag)
        self._delivered.clear()
        self.flush_if_possible()

    def extend(self) -> None:
        """Renew this process's claims on its messages."""
        pending = self.channel.pending_acks
        tags = {*(self._delivered.keys() - self._dirty), *pending.acks, *pending.delayed}
        with self.channel.conn_or_acquire() as redis:
            redis.execute_command("EVAL", EXTEND, 1, self.channel.record_keys[1], *tags)

    # When to send

    def flush_unless_scheduled(self) -> None:
        """Flush, unless a flush is scheduled. Raises where the broker refuses or is away."""
        if not self._is_flush_scheduled:
            self.channel.pending_acks.flush(self)

    def flush_if_possible(self) -> None:
        """Flush; what the broker refuses stays pending."""
        channel = self.channel
        if channel.closed and channel.connection is None:
            return
        try:
            channel.pending_acks.flush(self)
        except (*channel.connection_errors, ResponseError) as error:
            channel.backoff.complain(error)

    def _flush_soon(self) -> None:
        """Flush after ACK_BATCH_WINDOW_S, together with jobs that end until then; at once without an event loop."""
        hub = get_event_loop()
        if hub is None:
            self.flush_if_possible()
        elif not self._is_flush_scheduled:
            self._is_flush_scheduled = True
            hub.call_later(ACK_BATCH_WINDOW_S, self._flush_scheduled)

    def _flush_scheduled(self) -> None:
        self._is_flush_scheduled = False
        self.flush_if_possible()

    # What is sent: worker.queue.pending_acks.AckSender

    def send_acks(self, acks: Mapping[str, str | None]) -> None:
        """Delete messages, and the counted returns of redelivered jobs."""
        names = [REDELIVERIES.named(id) for id in acks.values() if id]
        with self.pipe_or_acquire() as pipe:
            pipe.zrem(self.unacked_index_key, *acks).hdel(self.unacked_key, *acks)
            if names:
                pipe.delete(*names)
            pipe.execute()

    def send_hand_backs(self, origins: Mapping[str, Origin]) -> None:
        prefix = self.channel.global_keyprefix
        with self.channel.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
            for tag, origin in origins.items():
                keys = [*self.channel.record_keys, prefix + origin.list]
                pipe.execute_command("EVAL", HAND_BACK, len(keys), *keys, tag, origin.ending)
            known = pipe.execute()
        for tag, is_known in zip(origins, known, strict=True):
            if not is_known:
                self.restore_by_tag(tag)

    def send_delayed(self, delayed: Mapping[str, DelayedMessage]) -> None:
        ids = self.channel.global_keyprefix + DUE_IDS.pattern
        keys = [*self.channel.record_keys, ids, *(each.key for each in delayed.values())]
        arguments = [part for tag, each in delayed.items() for part in (tag, each.at, each.ending, each.id)]
        with self.channel.conn_or_acquire() as client:
            client.execute_command("EVAL", DELAY, len(keys), *keys, *arguments)

    def send_requeue(self, tag: str, *, last: bool) -> None:
        self.restore_by_tag(tag, leftmost=last)
