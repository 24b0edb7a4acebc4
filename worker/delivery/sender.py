"""One attempt at a callback: whether it may go there, its signature, its request, and what the answer means.

It goes through the guard (`worker/net`): the address is checked where the connection is made, and the response is
neither awaited nor read beyond the policy.
"""

from __future__ import annotations

import contextlib
import functools
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal
from urllib.parse import urlsplit

import requests
from pydantic import SecretStr
from standardwebhooks import Webhook

from config.settings import Settings
from tasks.addresses import Network, literal
from tasks.errors import InvalidRequest
from tasks.outbox import Delivery
from tasks.payloads import Callback
from worker.net.deadline import Deadline
from worker.net.guard import Guard, NoAddress
from worker.net.policy import GuardError, NetworkPolicy, Refused, check_plain, check_url, is_allowed_address
from worker.net.session import (
    NETWORK_ERRORS,
    GuardedSession,
    describe_failure,
    parse_retry_after,
    tls_context,
    user_agent,
)
from worker.runtime import gil

#: Bytes of an answer that are read. Nothing is done with them: but a receiver that is cut off may log an error.
ANSWER_BYTES = 4_096
#: Seconds that a Retry-After may add at most.
MAX_RETRY_AFTER_S = 86_400.0
#: A delay is between these parts of what the schedule says, so that what failed together does not come back together.
JITTER = (0.8, 1.2)
#: Seconds for one look-up while a job waits for it.
LOOK_UP_S = 2.0
#: Looked-up hosts that are remembered, for a minute.
KNOWN_HOSTS = 1_024

# --- Where callbacks may go -----------------------------------------------------------------------


def check(callback: Callback, settings: Settings, *, look_up: bool = True) -> None:
    """Raises InvalidRequest for a callback that this operator's policy forbids, as far as can be told now.

    The connection is checked again when it is made: a name may have another address by then.
    """
    if callback.key_id not in settings.callback_keys:
        raise InvalidRequest(
            "callback.key_id: this worker has no secret of that id. Use one of the operator's, or have it added to "
            "IDEFICS_CALLBACK_KEYS.",
            detail="callback",
        )
    try:
        _check_target(callback.url, settings, look_up)
    except Refused as error:
        raise InvalidRequest(f"callback.url: {error}.", detail="callback") from None


def _check_target(url: str, settings: Settings, look_up: bool) -> None:
    policy = callback_policy(settings)
    _check_scheme(url, settings)
    check_plain(url)
    host = check_url(url, policy).hostname or ""
    address = literal(host)
    if address is not None:
        is_good = is_allowed_address(address, policy)
    else:
        is_good = not look_up or _is_good_name(host, policy.allow_networks, int(time.monotonic()) // 60)
    if not is_good:
        raise Refused(
            f"{host} is not a public address: use one that is, or have its network added to "
            "IDEFICS_CALLBACK_ALLOW_NETWORKS"
        )


def _check_scheme(url: str, settings: Settings) -> None:
    if not settings.callback_allow_http and urlsplit(url).scheme != "https":
        raise Refused("Callbacks go by https: write https://host/path or have IDEFICS_CALLBACK_ALLOW_HTTP set")


@functools.lru_cache(KNOWN_HOSTS)
def _is_good_name(host: str, allow_networks: tuple[Network, ...], minute: int) -> bool:
    """False for a name that leads to a forbidden address now. One without an address is tried when its time comes."""
    guard = Guard(NetworkPolicy(allow_networks=allow_networks), Deadline(LOOK_UP_S))
    try:
        with gil.released():
            guard.resolve(host, 443)
    except (NoAddress, TimeoutError):
        return True
    except Refused:
        return False
    return True


def callback_policy(settings: Settings) -> NetworkPolicy:
    return NetworkPolicy(
        allow_networks=settings.callback_allow_networks,
        allow_domains=settings.callback_allow_domains,
        ports=settings.callback_ports,
        max_bytes=ANSWER_BYTES,
        read_s=settings.callback_timeout_s,
        total_s=settings.callback_timeout_s,
        ca_file=settings.ca_file,
        settings_prefix="IDEFICS_CALLBACK",
    )


# --- The attempt ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """What an attempt met. Without a status there was no answer; `is_refused` is the guard's word."""

    status: int | None = None
    note: str = ""
    #: Seconds that the receiver asks to be left alone.
    retry_after_s: float = 0.0
    is_refused: bool = False


class Sender:
    """Posts deliveries from many threads at once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._policy = callback_policy(settings)
        self._tls = tls_context(self._policy.ca_file)
        self._agent = user_agent("callbacks")

    def post(self, delivery: Delivery) -> Answer:
        """Attempt it, in `callback_timeout_s` at most. Never raises for what a receiver does."""
        secrets = self._settings.callback_keys.get(delivery.key_id)
        if not secrets:
            return Answer(note="no secret of its key_id in IDEFICS_CALLBACK_KEYS")
        guard = Guard(self._policy, Deadline(self._policy.total_s))
        try:
            with GuardedSession(guard, self._tls) as session:
                return self._answer(session, delivery, secrets)
        except NoAddress:
            return Answer(note="its host has no address in the DNS")
        except Refused as error:
            return Answer(note=f"refused: {error}", is_refused=True)
        except GuardError:
            return Answer(note="its answer has no end")
        except NETWORK_ERRORS as error:
            late = f"did not answer within {self._policy.total_s:g} s"
            return Answer(note=late if guard.deadline.has_passed() else describe_failure(error)[0])
        except ValueError:
            return Answer(note="refused: its URL is malformed", is_refused=True)

    def _answer(self, session: GuardedSession, delivery: Delivery, secrets: Sequence[SecretStr]) -> Answer:
        _check_scheme(delivery.url, self._settings)
        body = delivery.body.encode()
        headers = {
            "User-Agent": self._agent,
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
            "Connection": "close",
            **signed(delivery.id, delivery.body, secrets, datetime.now(UTC)),
        }
        with session.send_checked(requests.Request("POST", delivery.url, headers=headers, data=body)) as response:
            # The status counts, however the rest arrives.
            with contextlib.suppress(*NETWORK_ERRORS, GuardError):
                response.raw.read(ANSWER_BYTES, decode_content=False)
            status = response.status_code
            return Answer(status, f"status {status}", retry_after_s(response.headers, time.time()))


def signed(id: str, body: str, secrets: Sequence[SecretStr], now: datetime) -> dict[str, str]:
    """Standard Webhooks' headers: one signature for each secret, so that a receiver may know the old or the new one."""
    signatures = [Webhook(secret.get_secret_value()).sign(id, now, body) for secret in secrets]
    return {
        "webhook-id": id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(signatures),
    }


def retry_after_s(headers: Mapping[str, str], now: float) -> float:
    """The seconds that an answer's Retry-After asks for, within bounds; 0 without a readable one."""
    return min(parse_retry_after(headers.get("Retry-After", ""), now) or 0.0, MAX_RETRY_AFTER_S)


# --- What follows: pure ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a delivery after an attempt."""

    state: Literal["delivered", "again", "failed"]
    #: Seconds to its next attempt.
    wait_s: float = 0.0
    disables_url: bool = False


def judge(answer: Answer, attempts: int, schedule: Sequence[float]) -> Verdict:
    """2xx alone is success. `attempts` were made before this one."""
    if answer.status is not None and 200 <= answer.status < 300:
        return Verdict("delivered")
    if answer.status == 410:
        return Verdict("failed", disables_url=True)
    if answer.is_refused or attempts + 1 >= len(schedule):
        return Verdict("failed")
    wait = schedule[attempts + 1] * random.uniform(*JITTER)  # noqa: S311 - jitter, not a secret
    return Verdict("again", max(wait, answer.retry_after_s))
