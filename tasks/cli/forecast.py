"""Shows a dry run: what is wrong with the table, and what the campaign would take (`idefics-jobs run --dry-run`)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from ..campaign.dry_run import DryRun, dry_run
from ..campaign.forecast import Estimate, Forecast, HostForecast
from ..campaign.hosts import NO_HOST
from ..campaign.makespan import Cause
from ..campaign.plan import Plan
from ..campaign.sample import OTHERS
from ..campaign.tables import open_table
from ..campaign.validation import Validation
from ..errors import QueueFull
from .console import away, duration, echo, echo_json, echo_rows
from .jobs import fail
from .progress import LOGGED_S

#: Hosts that are shown; JSON has all.
SHOWN_HOSTS = 20
#: What a campaign waits for, and what helps.
KINDS = {
    "host": "the host {host}: it answers slowly, or not at all. More downloads from it at once help if it allows them "
    "(IDEFICS_IMAGE_HOST_CONCURRENCY); rows of a host that is down are better left out",
    "model": "the model: more workers, or shorter answers, help",
    "workers": "the workers' own speed: more workers help",
    "downloads": "downloads from all hosts together: more workers, or a higher IDEFICS_IMAGE_JOBS, help",
    "window": "the jobs in flight: a larger --window helps",
    "retries": "the last rows, whose images are tried again",
    "queue": "the jobs that wait in the queue already",
}


def forecast(client: Any, input: str, plan: Plan, *, window: int, priority: int, sample: int | None = None) -> DryRun:
    """Do a dry run, with its progress on standard error. Raises CampaignError or ModelNotFound."""
    table = open_table(input, encoding=plan.encoding, delimiter=plan.delimiter)
    for note in table.notes:
        echo(note, err=True)
    progress = _Progress()
    try:
        return dry_run(client, plan, table, window=window, priority=priority, size=sample, on_progress=progress.tell)
    except QueueFull as error:
        fail(error)
    except (RedisError, OperationalError) as error:
        raise away(error) from None


class _Progress:
    """A line on standard error now and then."""

    def __init__(self) -> None:
        self._told_at = time.monotonic()

    def tell(self, text: str) -> None:
        if time.monotonic() - self._told_at >= LOGGED_S:
            self._told_at = time.monotonic()
            echo(text, err=True)


def show(run: DryRun, gpu_hour_price: float | None = None, *, as_json: bool = False) -> None:
    """Print a dry run. `gpu_hour_price`: of one worker, in any currency."""
    if as_json:
        echo_json(run.as_dict(gpu_hour_price), on_one_line=True)
        return
    _show_validation(run.validation)
    if run.forecast is not None:
        _show_forecast(run.forecast, run.seconds, gpu_hour_price)
    for note in run.notes:
        echo(note)


def _show_validation(found: Validation) -> None:
    if not found.invalid:
        echo(f"{found.rows:,} rows, all of them valid.")
        return
    echo(f"{found.rows:,} rows; {found.invalid:,} are invalid, and would fail without being sent:")
    echo_rows(("invalid rows", "why"), [(f"{count:,}", kind) for kind, count in found.kinds.most_common()])
    echo_rows(("row", "problem"), [(f"{each.row:,}", each.message) for each in found.first])


def _show_forecast(found: Forecast, seconds: float, gpu_hour_price: float | None) -> None:
    ran = f"{found.sampled:,} rows were run in {duration(seconds)}"
    echo(f"{ran} by {found.workers} worker{'s' if found.workers != 1 else ''}. The whole campaign, from a sample:")
    echo_rows(("", "forecast", "from", "to"), list(_totals(found, gpu_hour_price)))
    hosts = [each for each in found.hosts if each.host != NO_HOST]
    if hosts:
        columns = ("host", "rows", "sampled", "failed rows", "time for it alone")
        echo_rows(columns, [_host(each) for each in hosts[:SHOWN_HOSTS]])
    echo_rows(("it waits for", "time"), [(_name(cause), duration(part)) for cause, part in found.causes if part >= 1])
    if found.dominant is not None:
        echo(f"Most of the time it waits for {KINDS[found.dominant.kind].format(host=_named(found.dominant.host))}.")


def _totals(found: Forecast, gpu_hour_price: float | None) -> Iterator[tuple[str, ...]]:
    yield ("time", *map(duration, _ends(found.seconds)))
    yield ("prompt tokens", *map(_number, _ends(found.prompt_tokens)))
    yield ("new tokens", *map(_number, _ends(found.completion_tokens)))
    yield ("failed rows", *map(_number, _ends(found.failed)))
    for code, count in found.failures.items():
        yield (f"  {code}", *map(_number, _ends(count)))
    yield ("GPU hours", *(f"{hours:,.2f}" for hours in _ends(found.gpu_hours())))
    if gpu_hour_price is not None:
        yield ("cost", *(f"{cost:,.2f}" for cost in _ends(found.cost(gpu_hour_price))))


def _ends(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high


def _host(found: HostForecast) -> tuple[str, ...]:
    failed = _range(*map(_number, _ends(found.failed)))
    alone = _range(*map(duration, _ends(found.seconds)))
    return _named(found.host), f"{found.rows:,}", f"{found.sampled:,}", failed, alone


def _range(value: str, low: str, high: str) -> str:
    return value if low == value == high else f"{value} ({low} to {high})"


def _named(host: str | None) -> str:
    return "all smaller hosts" if host == OTHERS else host or ""


def _name(cause: Cause) -> str:
    return f"host {_named(cause.host)}" if cause.host else cause.kind


def _number(count: float) -> str:
    return f"{count:,.0f}"
