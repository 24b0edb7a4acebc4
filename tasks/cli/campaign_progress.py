"""A campaign's progress on standard error."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from ..campaign import Progress
from .console import duration
from .progress import Display

#: Codes and hosts that are shown.
SHOWN = 3
#: What bounds the rate, for people.
BOUNDS = {
    "hosts": "most jobs wait for image hosts",
    "queue": "other jobs are ahead in the queue",
    "model": "the model is busy",
    "producer": "the workers have free places",
    "no worker": "no worker takes from the queue",
}


class CampaignDisplay(Display):
    """Shows a campaign's progress."""

    def tell(self, progress: Progress) -> None:
        if self.is_due(progress.trouble):
            total = None if progress.rows is None else progress.rows - progress.left_out
            self.show(text_of(progress), progress.done, total)


def text_of(progress: Progress) -> str:
    """The line of progress."""
    total = "" if progress.rows is None else f" of {progress.rows - progress.left_out:,}"
    told = f"{progress.done:,}{total} rows done, {_failed(progress)}, {progress.in_flight:,} in flight"
    if progress.is_paused:
        return f"{told}; paused"
    told += f", {progress.rate:,.1f}/s"
    told += f", about {duration(progress.left_s)} left" if progress.left_s is not None else ""
    if progress.trouble:
        return f"{told}; waiting: {progress.trouble}"
    return f"{told}; {BOUNDS[progress.bound]}" if progress.bound in BOUNDS else told


def _failed(progress: Progress) -> str:
    told = f"{progress.failed:,} failed"
    parts = [part for part in (counts(progress.by_code), counts(progress.by_host)) if part]
    return f"{told} ({'; '.join(parts)})" if parts else told


def counts(found: Mapping[str, int]) -> str:
    """The most frequent of some counts; empty for none."""
    told = ", ".join(f"{name} {count:,}" for name, count in islice(found.items(), SHOWN))
    return f"{told} and {len(found) - SHOWN:,} more" if len(found) > SHOWN else told
