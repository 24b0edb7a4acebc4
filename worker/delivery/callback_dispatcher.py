"""Claims due deliveries from the outbox (`tasks/outbox.py`), attempts them in threads, settles each by its result."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Literal
from urllib.parse import urlsplit

from config.settings import Settings
from tasks.availability import UNAVAILABLE
from tasks.outbox import Delivery, Outbox
from worker.delivery.about import about_delivery
from worker.delivery.batching import admit, batch_of, group_by_target
from worker.delivery.known_hosts import KnownHosts
from worker.delivery.retry import AttemptResult, decide
from worker.delivery.sender import Sender
from worker.observability import tracing
from worker.observability.metrics import CALLBACK_ATTEMPTS, CALLBACK_DELIVERIES, CALLBACK_SECONDS
from worker.observability.redaction import without_message

logger = logging.getLogger(__name__)

#: Seconds between two polls of the outbox; an attempt that ends starts the next one at once.
POLL_INTERVAL_S = 0.2
#: The same while Redis cannot be reached, or after a defect.
ERROR_INTERVAL_S = 1.0
#: Seconds between two removals of old deliveries.
TRIM_INTERVAL_S = 60.0
#: Seconds that a lease lasts beyond an attempt's timeout. The deliveries of a killed worker wait for its end.
LEASE_MARGIN_S = 5.0
#: Ended deliveries that are read at start, to learn which hosts answer.
RECENT_DELIVERIES = 1_000


class CallbackDispatcher:
    """Attempts due deliveries: one thread claims them, `callback_concurrency` others post them."""

    def __init__(
        self, outbox: Outbox, settings: Settings, post: Callable[[Delivery], AttemptResult] | None = None
    ) -> None:
        """`post` makes one attempt; by default it is `Sender.post`."""
        self._outbox = outbox
        self._settings = settings
        self._post = post or Sender(settings).post
        self._lease_s = settings.callback_timeout_s + LEASE_MARGIN_S
        self._per_host = max(1, settings.callback_concurrency // 4)
        self._batch_max = settings.callback_batch_max if settings.callback_batch_window_s else 1
        #: Attempts that run, by host.
        self._busy: Counter[str] = Counter()
        self._hosts = KnownHosts(settings.callback_timeout_s)
        self._is_prepared = False
        #: Guards `_busy` and `_hosts`.
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._is_stopping = False
        self._trimmed_at = 0.0
        self._threads = ThreadPoolExecutor(settings.callback_concurrency, thread_name_prefix="callback")
        self._loop = threading.Thread(target=self._run, daemon=True, name="dispatcher")

    def start(self) -> None:
        """Start the claiming thread."""
        self._loop.start()

    @property
    def is_busy(self) -> bool:
        """True while attempts run. May be read from any thread."""
        return any(list(self._busy.values()))

    def stop(self) -> None:
        """Claim nothing more, and wait for the attempts that run."""
        self._is_stopping = True
        self._wake.set()
        self._loop.join()
        self._threads.shutdown()

    def _run(self) -> None:
        while not self._is_stopping:
            self._wake.wait(self._poll())
            self._wake.clear()

    def _poll(self) -> float:
        """Dispatch what is due; return the seconds to the next poll, which the end of an attempt may cut short."""
        try:
            self._dispatch_due()
        except UNAVAILABLE as error:
            logger.warning("The deliveries cannot be read (%s): trying again.", error)
            return ERROR_INTERVAL_S
        except Exception as error:
            logger.error("A defect in the dispatcher of callbacks; it continues.", exc_info=without_message(error))
            return ERROR_INTERVAL_S
        return POLL_INTERVAL_S

    def _prepare(self) -> None:
        """Learn from what earlier workers left in the outbox: which hosts answer, and how much is pending."""
        delivered = self._outbox.listed("delivered", RECENT_DELIVERIES)
        try:
            self._outbox.recount()
        except UNAVAILABLE as error:
            # A server without free memory still lets pending deliveries be sent.
            logger.warning("The bytes of pending deliveries cannot be counted again: %s", error)
        with self._lock:
            self._hosts = KnownHosts(
                self._settings.callback_timeout_s, [delivery.host for delivery in reversed(delivered)]
            )
        self._is_prepared = True

    def _dispatch_due(self) -> None:
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
            free, self._lease_s, per_host=self._per_host, each=self._batch_max, busy=busy, shares=shares
        )
        admitted, waiting = admit(group_by_target(due, self._batch_max), busy, free, self._per_host, shares)
        for group in admitted:
            self._dispatch(group)
        for delivery in waiting:
            self._outbox.put_back(delivery)
        if time.monotonic() - self._trimmed_at > TRIM_INTERVAL_S:
            self._trimmed_at = time.monotonic()
            self._outbox.trim(self._settings.callback_keep_s)

    def _dispatch(self, group: list[Delivery]) -> None:
        delivery = group[0] if len(group) == 1 else self._batched(group)
        if delivery is None:
            return
        with self._lock:
            self._busy[delivery.host] += 1
        self._threads.submit(self._attempt, delivery)

    def _batched(self, members: list[Delivery]) -> Delivery | None:
        """Replace members by their batch in the outbox; None if another worker has claimed one of them meanwhile."""
        batch = batch_of(members, datetime.now(UTC))
        return batch if self._outbox.batch(batch, members, self._lease_s, self._keep_s) else None

    def _attempt(self, delivery: Delivery) -> None:
        """Attempt and settle a delivery, in its own thread. Raises nothing."""
        with about_delivery(delivery):
            self._attempt_and_settle(delivery)

    def _attempt_and_settle(self, delivery: Delivery) -> None:
        try:
            if self._outbox.is_disabled(delivery.url):
                self._end(delivery, "failed", "its URL is disabled since it answered 410")
            else:
                with tracing.attempt(delivery) as note:
                    result = self._posted(delivery)
                    note(result)
                    self._settle(delivery, result)
        except UNAVAILABLE as error:
            logger.warning("The result of delivery %s cannot be stored (%s): it is sent again.", delivery.id, error)
        except Exception as error:
            logger.error("A defect at delivery %s.", delivery.id, exc_info=without_message(error))
            self._settle_defect(delivery, error)
        finally:
            with self._lock:
                self._busy[delivery.host] -= 1
                self._busy += Counter()  # drops hosts at zero
            self._wake.set()

    def _posted(self, delivery: Delivery) -> AttemptResult:
        started = time.monotonic()
        result = self._post(delivery)
        seconds = time.monotonic() - started
        CALLBACK_SECONDS.observe(seconds)
        CALLBACK_ATTEMPTS.labels(result.kind).inc()
        with self._lock:
            self._hosts.note(delivery.host, has_answered=result.status is not None, seconds=seconds)
        return result

    def _settle_defect(self, delivery: Delivery, error: Exception) -> None:
        """Count a defect as a failed attempt: otherwise the delivery would be sent again after each lease, forever."""
        try:
            self._settle(delivery, AttemptResult(note=f"a defect ({type(error).__name__}): see the log"))
        except Exception as again:
            again_info = without_message(again)
            logger.error("Delivery %s is sent again when its lease ends.", delivery.id, exc_info=again_info)

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
        self._end(delivery, decision.state, result.note)

    def _end(self, delivery: Delivery, state: Literal["delivered", "failed"], note: str) -> None:
        # False if its lease has expired: another worker settles it.
        if self._outbox.end(delivery, state, note, self._keep_s):
            CALLBACK_DELIVERIES.labels(state).inc()

    @property
    def _keep_s(self) -> int:
        return self._settings.callback_keep_s
