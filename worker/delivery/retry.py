"""Decides after an attempt at a callback: delivered, another attempt, or failed. Pure except for the jitter.

The seconds between attempts are `IDEFICS_CALLBACK_SCHEDULE_S` (`config/settings.py`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

#: A delay is the schedule's times a random factor in this range, so that deliveries that failed together spread out.
JITTER = (0.8, 1.2)


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """How an attempt ended."""

    #: The HTTP status; None where no response came.
    status: int | None = None
    #: The status or what went wrong, for the log and the list of deliveries.
    note: str = ""
    #: Seconds that the receiver asks to wait, by its Retry-After.
    retry_after_s: float = 0.0
    #: True where the operator's policy forbids the attempt.
    is_refused: bool = False

    @property
    def kind(self) -> str:
        """The result as a label of `CALLBACK_ATTEMPTS`."""
        if self.status is None:
            return "forbidden" if self.is_refused else "unreachable"
        return "accepted" if self.is_success else "rejected"

    @property
    def is_success(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


@dataclass(frozen=True, slots=True)
class RetryDecision:
    """A delivery's state after an attempt."""

    state: Literal["delivered", "again", "failed"]
    #: Seconds to the next attempt, if there is one.
    wait_s: float = 0.0
    #: True if other deliveries to the URL must not be attempted either.
    disables_url: bool = False


def decide(result: AttemptResult, attempts: int, schedule: Sequence[float]) -> RetryDecision:
    """Decide by an attempt's result; only 2xx is success.

    `attempts`: number of attempts before this one. `schedule`: seconds to wait before each attempt.
    """
    if result.is_success:
        return RetryDecision("delivered")
    if result.status == 410:
        return RetryDecision("failed", disables_url=True)
    if result.is_refused or attempts + 1 >= len(schedule):
        return RetryDecision("failed")
    wait_s = schedule[attempts + 1] * random.uniform(*JITTER)  # noqa: S311 - jitter, not a secret
    return RetryDecision("again", max(wait_s, result.retry_after_s))
