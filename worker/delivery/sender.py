"""One attempt at a callback: sign it, post it, and read the response's status.

The guard (`worker/net`) checks the address when the connection is made, and bounds the time and the bytes read.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import requests
from pydantic import SecretStr
from standardwebhooks import Webhook

from config.settings import Settings
from tasks.outbox import Delivery
from worker.delivery.callback_policy import RESPONSE_BYTES, callback_policy, check_scheme
from worker.delivery.retry import AttemptResult
from worker.net.deadline import Deadline
from worker.net.guard import Guard, NoAddress
from worker.net.policy import GuardError, Refused
from worker.net.session import (
    NETWORK_ERRORS,
    GuardedSession,
    describe_failure,
    parse_retry_after,
    tls_context,
    user_agent,
)
from worker.observability import tracing

#: Longest wait in seconds that a Retry-After may ask for.
MAX_RETRY_AFTER_S = 86_400.0


class Sender:
    """Posts deliveries. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._policy = callback_policy(settings)
        self._tls = tls_context(self._policy.ca_file)
        self._agent = user_agent("callbacks")

    def post(self, delivery: Delivery) -> AttemptResult:
        """Attempt a delivery, in `callback_timeout_s` at most. Never raises for what a receiver does."""
        secrets = self._settings.callback_keys.get(delivery.key_id)
        if not secrets:
            return AttemptResult(note="no secret of its key_id in IDEFICS_CALLBACK_KEYS")
        guard = Guard(self._policy, Deadline(self._policy.total_s))
        try:
            with GuardedSession(guard, self._tls) as session:
                return self._attempt(session, delivery, secrets)
        except NoAddress:
            return AttemptResult(note="its host has no address in the DNS")
        except Refused as error:
            return AttemptResult(note=f"refused: {error}", is_refused=True)
        except GuardError:
            return AttemptResult(note="its answer has no end")
        except NETWORK_ERRORS as error:
            late = f"did not answer within {self._policy.total_s:g} s"
            return AttemptResult(note=late if guard.deadline.has_passed() else describe_failure(error)[0])
        except ValueError:
            return AttemptResult(note="refused: its URL is malformed", is_refused=True)

    def _attempt(self, session: GuardedSession, delivery: Delivery, secrets: Sequence[SecretStr]) -> AttemptResult:
        check_scheme(delivery.url, self._settings)
        headers = {
            "User-Agent": self._agent,
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
            "Connection": "close",
            **_trace(),
            **signed(delivery.id, delivery.body, secrets, datetime.now(UTC)),
        }
        request = requests.Request("POST", delivery.url, headers=headers, data=delivery.body.encode())
        with session.send_checked(request) as response:
            # The status decides, even if the body does not arrive.
            with contextlib.suppress(*NETWORK_ERRORS, GuardError):
                response.raw.read(RESPONSE_BYTES, decode_content=False)
            status = response.status_code
            return AttemptResult(status, f"status {status}", retry_after_s(response.headers, time.time()))


def _trace() -> dict[str, str]:
    """The header by which a receiver continues the trace, if there is one."""
    traceparent = tracing.traceparent()
    return {"traceparent": traceparent} if traceparent else {}


def signed(id: str, body: str, secrets: Sequence[SecretStr], now: datetime) -> dict[str, str]:
    """The headers of Standard Webhooks. One signature for each secret: a receiver may have the old or the new one."""
    signatures = [Webhook(secret.get_secret_value()).sign(id, now, body) for secret in secrets]
    return {
        "webhook-id": id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(signatures),
    }


def retry_after_s(headers: Mapping[str, str], now: float) -> float:
    """Seconds to wait by a response's Retry-After, within bounds; 0 without a readable one. `now`: Unix seconds."""
    return min(parse_retry_after(headers.get("Retry-After", ""), now) or 0.0, MAX_RETRY_AFTER_S)
