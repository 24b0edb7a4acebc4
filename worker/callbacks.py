"""The callbacks worker: `celery -A worker.callbacks worker`. Light: no torch, no model, no images.

Celery gives it its life (start, stop, logs, ping); its work comes from the outbox (`tasks/outbox.py`), a sorted set in
Redis. No message is sent to its queue: a second, unordered copy of the same schedule would have to be kept in step.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from celery import Celery, bootsteps
from celery.signals import setup_logging, worker_init

from config.celery import configuration, drop_overrides
from config.settings import Settings, load
from tasks.availability import UNAVAILABLE
from tasks.outbox import Delivery, Outbox, Shares, batch_id, connect
from tasks.payloads import CALLBACK_QUEUE, DEFAULT_PRIORITY
from tasks.webhooks import MAX_BODY_BYTES, batch_body
from worker.delivery.known_hosts import KnownHosts
from worker.delivery.retry import AttemptResult, decide
from worker.delivery.sender import Sender
from worker.observability import log_setup
from worker.runtime.exit_watchdog import ExitInTime, Held

logger = logging.getLogger(__name__)

#: Seconds between two looks at what is due.
POLL_S = 0.2
#: Seconds between two looks while Redis is away, and between two removals of old deliveries.
AWAY_S = 1.0
TRIM_S = 60.0
#: Seconds beyond an attempt's own that a claim lasts. Of a worker that was killed, deliveries go on after so long.
LEASE_MARGIN_S = 5.0
#: Delivered ones that are read at a start, for the hosts that answer.
RECENT_DELIVERIES = 1_000
#: What a batch's frame takes of its 20 kB, and each event's id.
BATCH_FRAME_BYTES = 200
BATCH_ID_BYTES = 50


# --- Which of the due deliveries go out now: pure -------------------------------------------------


def grouped(due: Iterable[Delivery], most: int) -> list[list[Delivery]]:
    """What goes out in one call: first attempts at the same URL with the same key, within a batch's bounds."""
    groups: list[list[Delivery]] = []
    open_groups: dict[tuple[str, str], list[Delivery]] = {}
    sizes: Counter[tuple[str, str]] = Counter()
    for delivery in due:
        target = delivery.url, delivery.key_id
        size = len(delivery.body) + BATCH_ID_BYTES
        if most < 2 or delivery.attempts or delivery.event == "job.batch":
            groups.append([delivery])
            continue
        group = open_groups.get(target)
        if group is None or len(group) >= most or sizes[target] + size > MAX_BODY_BYTES - BATCH_FRAME_BYTES:
            group = open_groups[target] = []
            groups.append(group)
            sizes[target] = 0
        group.append(delivery)
        sizes[target] += size
    return groups


def admitted(
    groups: Iterable[list[Delivery]], busy: Mapping[str, int], free: int, per_host: int, shares: Shares | None = None
) -> tuple[list[list[Delivery]], list[Delivery]]:
    """The groups that go out now, and what waits for a thread or for its host."""
    shares = shares or Shares()
    counts = Counter(busy)
    others = silent = 0
    now: list[list[Delivery]] = []
    waiting: list[Delivery] = []
    for group in groups:
        host = group[0].host
        is_other, is_silent = host not in shares.answered, host in shares.silent
        is_beyond_share = (is_other and others >= shares.others) or (is_silent and silent >= shares.silent_calls)
        if len(now) >= free or counts[host] >= per_host or is_beyond_share:
            waiting += group
        else:
            counts[host] += 1
            others, silent = others + is_other, silent + is_silent
            now.append(group)
    return now, waiting


# --- The work -------------------------------------------------------------------------------------


class Courier:
    """Takes what is due from the outbox and attempts it, in threads."""

    def __init__(
        self, outbox: Outbox, settings: Settings, post: Callable[[Delivery], AttemptResult] | None = None
    ) -> None:
        self._outbox = outbox
        self._settings = settings
        self._post = post or Sender(settings).post
        self._lease_s = settings.callback_timeout_s + LEASE_MARGIN_S
        self._per_host = max(1, settings.callback_concurrency // 4)
        self._batch_most = settings.callback_batch_max if settings.callback_batch_window_s else 1
        self._busy: Counter[str] = Counter()
        self._hosts = KnownHosts(settings.callback_timeout_s)
        self._is_prepared = False
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._is_stopping = False
        self._trimmed_at = 0.0
        self._threads = ThreadPoolExecutor(settings.callback_concurrency, thread_name_prefix="callback")
        self._loop = threading.Thread(target=self._run, daemon=True, name="courier")

    def start(self) -> None:
        self._loop.start()

    @property
    def is_busy(self) -> bool:
        """Whether attempts run. By any thread."""
        return any(list(self._busy.values()))

    def stop(self) -> None:
        """Take nothing any more, and wait for the attempts that run."""
        self._is_stopping = True
        self._wake.set()
        self._loop.join()
        self._threads.shutdown()

    def _run(self) -> None:
        while not self._is_stopping:
            self._wake.wait(self._look())
            self._wake.clear()

    def _look(self) -> float:
        """One turn; the seconds to the next one, if no attempt ends before."""
        try:
            self._turn()
        except UNAVAILABLE as error:
            logger.warning("The deliveries cannot be read (%s): trying again.", error)
            return AWAY_S
        except Exception:
            logger.exception("A defect in the courier; it goes on.")
            return AWAY_S
        return POLL_S

    def _prepare(self) -> None:
        """Learn what earlier workers knew."""
        delivered = self._outbox.listed("delivered", RECENT_DELIVERIES)
        try:
            self._outbox.recount()
        except UNAVAILABLE as error:
            # A full server still lets what is pending go out.
            logger.warning("The pending deliveries' bytes are not counted anew: %s", error)
        with self._lock:
            self._hosts = KnownHosts(
                self._settings.callback_timeout_s, [delivery.host for delivery in reversed(delivered)]
            )
        self._is_prepared = True

    def _turn(self) -> None:
        if not self._is_prepared:
            self._prepare()
        threads = self._settings.callback_concurrency
        with self._lock:
            busy = dict(self._busy)
            shares = self._hosts.shares(threads, busy)
        free = threads - sum(busy.values())
        if free <= 0:
            return
        due = self._outbox.claim(
            free, self._lease_s, per_host=self._per_host, each=self._batch_most, busy=busy, shares=shares
        )
        now, waiting = admitted(grouped(due, self._batch_most), busy, free, self._per_host, shares)
        for group in now:
            self._send(group)
        for delivery in waiting:
            self._outbox.put_back(delivery)
        if time.monotonic() - self._trimmed_at > TRIM_S:
            self._trimmed_at = time.monotonic()
            self._outbox.trim(self._settings.callback_keep_s)

    def _send(self, group: list[Delivery]) -> None:
        delivery = group[0] if len(group) == 1 else self._batched(group)
        if delivery is None:
            return
        with self._lock:
            self._busy[delivery.host] += 1
        self._threads.submit(self._attempt, delivery)

    def _batched(self, members: list[Delivery]) -> Delivery | None:
        first = members[0]
        body = batch_body(datetime.now(UTC).isoformat(), [(member.id, member.body) for member in members])
        id = batch_id(member.id for member in members)
        batch = Delivery(id, "", "job.batch", first.url, first.key_id, body, token=first.token)
        return batch if self._outbox.batch(batch, members, self._lease_s, self._keep_s) else None

    def _attempt(self, delivery: Delivery) -> None:
        try:
            if self._outbox.is_disabled(delivery.url):
                self._outbox.end(delivery, "failed", "its URL is disabled since it answered 410", self._keep_s)
            else:
                self._settle(delivery, self._posted(delivery))
        except UNAVAILABLE as error:
            logger.warning("How delivery %s went cannot be kept (%s): it goes out again.", delivery.id, error)
        except Exception as error:
            logger.exception("A defect at delivery %s.", delivery.id)
            self._settle_defect(delivery, error)
        finally:
            with self._lock:
                self._busy[delivery.host] -= 1
                self._busy += Counter()  # drops hosts at zero
            self._wake.set()

    def _posted(self, delivery: Delivery) -> AttemptResult:
        started = time.monotonic()
        result = self._post(delivery)
        with self._lock:
            self._hosts.note(delivery.host, has_answered=result.status is not None, seconds=time.monotonic() - started)
        return result

    def _settle_defect(self, delivery: Delivery, error: Exception) -> None:
        """As an attempt that has failed: else it would go out at each end of its lease, for ever."""
        try:
            self._settle(delivery, AttemptResult(note=f"a defect ({type(error).__name__}): see the log"))
        except Exception:
            logger.exception("Delivery %s goes out again when its lease ends.", delivery.id)

    def _settle(self, delivery: Delivery, result: AttemptResult) -> None:
        decision = decide(result, delivery.attempts, self._settings.callback_schedule_s)
        what = (delivery.id, delivery.event, delivery.job, urlsplit(delivery.url).hostname, result.note)
        if decision.disables_url:
            self._outbox.disable(delivery.url, self._settings.callback_disabled_s)
        if decision.state == "again":
            logger.info("Delivery %s (%s of %s) to %s: %s; again in %.0f s.", *what, decision.wait_s)
            self._outbox.again(delivery, decision.wait_s, result.note)
            return
        log = logger.info if decision.state == "delivered" else logger.warning
        log("Delivery %s (%s of %s) to %s: %s; %s.", *what, decision.state)
        self._outbox.end(delivery, decision.state, result.note, self._keep_s)

    @property
    def _keep_s(self) -> int:
        return self._settings.callback_keep_s


class Deliveries(bootsteps.StartStopStep):  # type: ignore[misc]
    """The courier's life in Celery's worker."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._courier: Courier | None = None

    def start(self, worker: Any) -> None:
        self._courier = Courier(Outbox(connect(app)), settings)
        self._courier.start()
        if not settings.callback_keys:
            logger.warning(
                "IDEFICS_CALLBACK_KEYS is empty: no callback can be signed. Set it here and for the models' workers, "
                "as main=whsec_..., with a secret from `openssl rand -base64 32`."
            )

    def stop(self, worker: Any) -> None:
        if self._courier is not None:
            self._courier.stop()
            self._courier = None

    terminate = stop

    @property
    def is_busy(self) -> bool:
        courier = self._courier
        return courier is not None and courier.is_busy


class DeliveriesExitInTime(ExitInTime):
    """The exit watchdog of this worker: it holds no message, and waits for the attempts that run."""

    def held(self, worker: Any) -> Held:
        return Held(is_running=_deliveries(worker).is_busy, is_owed=False)


def _deliveries(worker: Any) -> Deliveries:
    return next(step for step in worker.steps if isinstance(step, Deliveries))


@setup_logging.connect(weak=False)  # type: ignore[untyped-decorator]
def _set_up_logging(logfile: str | None = None, **_: Any) -> None:
    log_setup.set_up(settings.log_level, logfile)


settings = load()
overrides = drop_overrides(os.environ, settings)
app = Celery("idefics.callbacks", set_as_current=False)
app.conf.update(configuration(settings, CALLBACK_QUEUE, DEFAULT_PRIORITY))
# It runs no tasks: the courier has threads of its own.
app.conf.update(worker_pool="solo", worker_prefetch_multiplier=1)
# Its Redis user may reach neither the GPU workers' mailbox nor what they have taken: it has a mailbox of its own, and
# does not look for messages to give back.
app.conf.control_exchange = "idefics.callbacks"
app.conf.broker_transport_options = {**app.conf.broker_transport_options, "ack_emulation": False}
app.steps["worker"].update([Deliveries, DeliveriesExitInTime])


@worker_init.connect(weak=False)  # type: ignore[untyped-decorator]
def _refuse_overrides(sender: Any, **_: Any) -> None:
    if sender.app is app and overrides:
        sys.exit(overrides)
