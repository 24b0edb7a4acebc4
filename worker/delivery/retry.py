"""What follows from an attempt at a callback: delivered, another attempt, or failed. Pure but for the jitter."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

#: A delay is between these parts of what the schedule says, so that what failed together does not come back together.
JITTER = (0.8, 1.2)


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """How an attempt ended."""

    #: The HTTP status; None where no response came.
    status: int | None = None
    #: For people: the status, or what went wrong.
    note: str = ""
    #: Seconds that the receiver asks to be left alone.
    retry_after_s: float = 0.0
    #: The policy forbade the attempt.
    is_refused: bool = False


@dataclass(frozen=True, slots=True)
class RetryDecision:
    """What becomes of a delivery after an attempt."""

    state: Literal["delivered", "again", "failed"]
    #: Seconds to its next attempt.
    wait_s: float = 0.0
    #: No delivery to this URL is attempted any more.
    disables_url: bool = False


def decide(result: AttemptResult, attempts: int, schedule: Sequence[float]) -> RetryDecision:
    """Decide by an attempt's result; 2xx alone is success.

    `attempts` were made before this one; `schedule` has the seconds before each attempt.
    """
    if result.status is not None and 200 <= result.status < 300:
        return RetryDecision("delivered")
    if result.status == 410:
        return RetryDecision("failed", disables_url=True)
    if result.is_refused or attempts + 1 >= len(schedule):
        return RetryDecision("failed")
    wait_s = schedule[attempts + 1] * random.uniform(*JITTER)  # noqa: S311 - jitter, not a secret
    return RetryDecision("again", max(wait_s, result.retry_after_s))
