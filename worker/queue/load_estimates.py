"""Whether a job ends sooner here or in another worker: pure estimates from the loads of all workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: The others must be faster by these seconds and by this share: an estimate's error must not leave a worker idle.
SLACK_S, SLACK_PART = 0.1, 0.1
#: Seconds by which jobs must end sooner elsewhere to go back.
WORTH_S = 0.25
#: Bounds of the estimated seconds of a job.
SHORTEST_S, LONGEST_S = 0.001, 1e6


@dataclass(frozen=True, slots=True)
class Load:
    """One worker's jobs and pace."""

    #: Jobs that its model runs at once, and seconds that each takes; the maximum batch size, and 0, while unknown.
    width: float
    job_s: float
    #: Jobs that wait here for the end of others; negative: how many more could begin at once.
    unbegun: int
    #: Whether it takes jobs from the queue.
    is_open: bool = True
    #: Seconds until the running batch lets further jobs join.
    closed_s: float = 0.0
    #: Whether further jobs wait here for their images' hosts.
    has_parked: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "job_s", min(self.job_s, LONGEST_S))

    @property
    def rate(self) -> float:
        """Jobs a second."""
        return max(1.0, self.width) / max(SHORTEST_S, self.job_s)

    def ends_in_s(self, more: int = 0) -> float:
        """Seconds until the last of its jobs ends, if it had `more` further jobs."""
        waiting = self.unbegun + more
        return (self.closed_s + waiting / self.rate if waiting > 0 else 0.0) + self.job_s


def leaves_to_others(mine: Load, others: Sequence[Load], queued: int) -> bool:
    """Whether the others would finish all queued jobs before one more job would end here."""
    takers = [each for each in others if each.is_open]
    if not takers:
        return False
    return mine.ends_in_s(1) > (1 + SLACK_PART) * _drained_in_s(takers, queued) + SLACK_S


def surplus(mine: Load, others: Sequence[Load], queued: int) -> int:
    """How many jobs that have not begun here should go back, so that all workers end at about the same time."""
    takers = [each for each in others if each.is_open]
    if not takers or mine.unbegun <= 0:
        return 0
    rate = sum(each.rate for each in takers)
    sooner_s = mine.ends_in_s() - _drained_in_s(takers, queued)
    free = max(0, -_ahead(takers, queued))
    if sooner_s < WORTH_S:
        return 0
    return min(mine.unbegun, int(sooner_s / (1 / mine.rate + 1 / rate)) + free)


def idle(others: Sequence[Load], queued: int) -> int:
    """How many of the other workers have nothing to do, no job of any kind."""
    if queued:
        return 0
    return sum(each.is_open and each.unbegun <= -each.width and not each.has_parked for each in others)


def _drained_in_s(takers: Sequence[Load], queued: int) -> float:
    rate = sum(each.rate for each in takers)
    return max(0, _ahead(takers, queued)) / rate + min(each.job_s for each in takers)


def _ahead(takers: Sequence[Load], queued: int) -> int:
    """Jobs that wait for a place in the takers; negative: free places."""
    return queued + sum(each.unbegun for each in takers)
