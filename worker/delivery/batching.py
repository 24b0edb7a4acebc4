"""Which due deliveries are sent now, and which of them together in one request. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from tasks.outbox import Delivery, Shares, batch_id
from tasks.webhooks import MAX_BODY_BYTES, batch_body

#: Bytes of a batch's body beside its events, and beside each event's own body.
BATCH_FRAME_BYTES = 200
BATCH_ID_BYTES = 50


def group_by_target(due: Iterable[Delivery], max_events: int) -> list[list[Delivery]]:
    """Group deliveries into requests: first attempts at one URL with one key share a request.

    A group has at most `max_events` deliveries, and fits into one body. A retried delivery and a batch are alone: a
    receiver that accepted them before must recognise them.
    """
    groups: list[list[Delivery]] = []
    open_groups: dict[tuple[str, str], list[Delivery]] = {}
    sizes: Counter[tuple[str, str]] = Counter()
    for delivery in due:
        target = delivery.url, delivery.key_id
        size = len(delivery.body) + BATCH_ID_BYTES
        if max_events < 2 or delivery.attempts or delivery.event == "job.batch":
            groups.append([delivery])
            continue
        group = open_groups.get(target)
        if group is None or len(group) >= max_events or sizes[target] + size > MAX_BODY_BYTES - BATCH_FRAME_BYTES:
            group = open_groups[target] = []
            groups.append(group)
            sizes[target] = 0
        group.append(delivery)
        sizes[target] += size
    return groups


def admit(
    groups: Iterable[list[Delivery]], busy: Mapping[str, int], free: int, per_host: int, shares: Shares | None = None
) -> tuple[list[list[Delivery]], list[Delivery]]:
    """Split groups into those that are sent now, and the deliveries that wait for a thread or for their host.

    `busy` counts the attempts that run, by host; `free` threads are left, and a host gets at most `per_host`.
    """
    shares = shares or Shares()
    counts = Counter(busy)
    others = silent = 0
    admitted: list[list[Delivery]] = []
    waiting: list[Delivery] = []
    for group in groups:
        host = group[0].host
        is_other, is_silent = host not in shares.answered, host in shares.silent
        is_beyond_share = (is_other and others >= shares.others) or (is_silent and silent >= shares.silent_calls)
        if len(admitted) >= free or counts[host] >= per_host or is_beyond_share:
            waiting += group
        else:
            counts[host] += 1
            others, silent = others + is_other, silent + is_silent
            admitted.append(group)
    return admitted, waiting


def batch_of(members: Sequence[Delivery], now: datetime) -> Delivery:
    """One delivery that replaces its members, with an id made of their ids."""
    first = members[0]
    body = batch_body(now.isoformat(), [(member.id, member.body) for member in members])
    id = batch_id(member.id for member in members)
    traces = " ".join(filter(None, (member.traces for member in members)))
    return Delivery(id, "", "job.batch", first.url, first.key_id, body, token=first.token, traces=traces)
