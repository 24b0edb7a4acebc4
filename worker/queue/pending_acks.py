"""Acks and requeues not yet sent to the broker.

`worker/pool/request.py` decides when a message is acknowledged, and `worker/queue/qos.py` does it. What Redis has not
been sent yet is kept here: it outlives a channel that lost its connection, and the next one sends it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from worker.queue.reserve import MAX_DELAYED

#: Seconds within which jobs that end are acknowledged together. If the worker dies before that, its jobs are delivered
#: again and found to have ended.
ACK_BATCH_WINDOW_S = 0.03


@dataclass(frozen=True, slots=True)
class DelayedMessage:
    """A message that waits for its time."""

    #: The sorted set.
    key: str
    #: Unix seconds.
    at: float
    #: Number of bytes after the message in its record in `unacked`.
    ending: int
    id: str


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a message came from."""

    list: str
    #: The text after the message in its record in `unacked`.
    ending: str


class AckSender(Protocol):
    """What `flush` sends through. All raise Redis's errors."""

    def send_acks(self, acks: Mapping[str, str | None]) -> None: ...
    def send_hand_backs(self, origins: Mapping[str, Origin]) -> None: ...
    def send_delayed(self, delayed: Mapping[str, DelayedMessage]) -> None: ...
    def send_requeue(self, tag: str, *, last: bool) -> None: ...


class PendingAcks:
    """Acks and requeues not yet sent to the broker, by the messages' tags; sent by `flush`."""

    def __init__(self) -> None:
        #: By tag. The value is the id of a redelivered job, whose redelivery count is deleted with it, or None.
        self.acks: dict[str, str | None] = {}
        #: By tag: True to put the message at the back of its queue, False to put it at the front.
        self.requeues: dict[str, bool] = {}
        self.delayed: dict[str, DelayedMessage] = {}
        #: Messages that are put back unchanged, as if they had never been taken.
        self.hand_backs: dict[str, Origin] = {}

    def __bool__(self) -> bool:
        return bool(self.acks or self.requeues or self.delayed or self.hand_backs)

    def ack(self, tag: str, redelivered_id: str | None = None) -> None:
        self.requeues.pop(tag, None)
        self.hand_backs.pop(tag, None)
        self.acks[tag] = redelivered_id

    def requeue(self, tag: str, *, last: bool = False) -> None:
        if tag not in self.acks and tag not in self.delayed and tag not in self.hand_backs:
            self.requeues[tag] = last

    def flush(self, sender: AckSender) -> None:
        """Send everything. Raises where the broker refuses or is away; what was not sent stays pending."""
        if acks := dict(self.acks):
            sender.send_acks(acks)
            _remove(acks, self.acks)
        if hand_backs := dict(self.hand_backs):
            # To send one twice does nothing.
            sender.send_hand_backs(hand_backs)
            _remove(hand_backs, self.hand_backs)
        while delayed := dict(itertools.islice(self.delayed.items(), MAX_DELAYED)):
            sender.send_delayed(delayed)
            _remove(delayed, self.delayed)
        for tag, last in list(self.requeues.items()):
            sender.send_requeue(tag, last=last)
            self.requeues.pop(tag, None)


def _remove(sent: Mapping[str, Any], pending: dict[str, Any]) -> None:
    for tag in sent:
        pending.pop(tag, None)


#: By the broker's identity, the prefix of its keys and the name of `unacked`. Global, since kombu makes the channels.
_by_broker: defaultdict[tuple[str, str, str], PendingAcks] = defaultdict(PendingAcks)


def pending_acks(broker: str, prefix: str, unacked: str) -> PendingAcks:
    """Those of all channels to one broker and deployment."""
    return _by_broker[broker, prefix, unacked]


def has_pending_acks() -> bool:
    """Whether any broker has not been sent all acks of this process. Called by any thread."""
    return any(list(_by_broker.values()))


def forget_pending_acks() -> None:
    """For tests: as in a new process."""
    _by_broker.clear()
