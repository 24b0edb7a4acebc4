"""What its users want of a campaign: that it runs, that it pauses, or that it ends.

One key in the queues' Redis for each campaign that is not simply to run. Its producer reads it, and the workers read it
before they begin one of its jobs. So pausing a campaign is one write, however many of its jobs are in flight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from .protocol import CAMPAIGN
from .redis_keys import CAMPAIGN_WANTED

State = Literal["running", "paused", "canceled"]

#: Seconds for which producers and workers use what they have read.
READ_S = 1.0
#: Seconds for which a worker holds a paused campaign's job back at most, before it looks again.
MAX_HELD_BACK_S = 30.0
#: The id under which others see a campaign (tasks/campaign/record.py).
_ID_CHARS, _ID_DIGITS = 12, frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What users want, and since when, in unix seconds by the server's clock."""

    state: State = "running"
    since: float = 0.0

    def written(self) -> str:
        return f"{self.state} {self.since:.3f}"

    @staticmethod
    def read(text: bytes | None) -> Wanted:
        """From a key's value; a missing one and one in another form mean that the campaign is to run."""
        state, _, since = (text or b"").decode(errors="replace").partition(" ")
        if state not in get_args(State):
            return Wanted()
        try:
            return Wanted(cast(State, state), float(since))
        except ValueError:
            return Wanted(cast(State, state))


def server_time(redis: Any) -> float:
    """Unix seconds by the server's clock. Raises RedisError."""
    seconds, microseconds = redis.time()
    return float(seconds + microseconds / 1e6)


def read_wanted(redis: Any, prefix: str, campaigns: Sequence[str]) -> dict[str, Wanted]:
    """What users want of some campaigns, in one command; none for none. `prefix`: of all keys. Raises RedisError."""
    found = redis.mget([prefix + CAMPAIGN_WANTED.named(id) for id in campaigns]) if campaigns else []
    return {id: Wanted.read(text) for id, text in zip(campaigns, found, strict=True)}


def campaign_of(headers: Mapping[str, Any]) -> str | None:
    """The campaign of a job, by its message's headers; None for a job without one, or with a value of another form."""
    id = headers.get(CAMPAIGN)
    return id if isinstance(id, str) and len(id) == _ID_CHARS and _ID_DIGITS.issuperset(id) else None
