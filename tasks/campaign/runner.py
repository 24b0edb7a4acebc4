"""Runs a campaign: a table's rows in, the same table with its answers out.

```python
plan = campaign.Plan(task="caption", image="url")
summary = campaign.run(Client("redis://localhost:6379/0"), "pictures.csv", "captions.csv", plan)
```

Run again with the same arguments after any interruption: the rows without an answer are run, and no others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from ..job_window import PRIORITY, WINDOW, JobsLost, JobWindow
from .bottleneck import Bottleneck
from .control import CampaignControl, CampaignInfo, CampaignProgress, this_host
from .fingerprints import answered_rows
from .limits import Limits
from .opening import is_finished, opened, stamp, take_up_failed
from .output import write_output
from .plan import Plan
from .progress import Progress, Rate, Tally
from .record import base_name
from .row_count import RowCount
from .rows import CampaignRow, CampaignRows
from .state import CampaignState, StoredAnswer
from .tables import Table, check_output, open_table

#: How a run ended: all rows have an answer; a limit was reached; others canceled it; it was interrupted.
End = Literal["finished", "limit", "canceled", "interrupted"]

_CANCELED = "It was canceled: run the same command to go on."
_INTERRUPTED = "It was interrupted, and jobs in flight go on: run the same command to go on."

_Window: TypeAlias = JobWindow[CampaignRow, StoredAnswer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a campaign runs. All but `only_new` may differ from one run to the next."""

    #: As others see it; default: the output's name.
    name: str = ""
    #: Jobs in flight at most.
    window: int = WINDOW
    #: 9 is last.
    priority: int = PRIORITY
    limits: Limits = field(default_factory=Limits)
    #: Run failed rows again, those with some codes or all where it is empty. None: leave them.
    retry_failed: Sequence[str] | None = None
    #: Earlier outputs: rows that have an answer without error there are left out.
    only_new: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """How a caller follows a run and ends it."""

    #: Called several times a second.
    on_progress: Callable[[Progress], None] = lambda progress: None
    #: Called with what the user should know, sentences.
    on_note: Callable[[str], None] = lambda text: None
    #: When it says so the run ends at once, without an output; jobs in flight go on.
    is_interrupted: Callable[[], bool] = lambda: False


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What has come of a campaign so far, all its runs together."""

    end: End
    #: Why it ended early, with the way to go on; empty if it finished.
    reason: str
    #: Whether it had finished before, and nothing was left to do.
    had_finished: bool
    #: Rows with an answer, and the failed ones among them.
    done: int
    failed: int
    #: Rows without an answer; None if the input was not read to its end.
    not_run: int | None
    #: Rows that --only-new left out.
    left_out: int
    by_code: dict[str, int]
    by_host: dict[str, int]
    #: Of all runs.
    seconds: float
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(
    client: Any, input: str, output: str, plan: Plan, options: Options | None = None, watch: Watch | None = None
) -> Summary:
    """Run a campaign, or go on with it.

    Raises CampaignError, before anything is sent, if the plan does not fit the input or the output is another
    campaign's; ModelNotFound for a client of a model that no worker serves; sqlite3.Error where the disk fails.
    """
    options, watch = options or Options(), watch or Watch()
    table = open_table(input, encoding=plan.encoding, delimiter=plan.delimiter)
    plan.check(table.columns)
    check_output(output)
    for note in table.notes:
        watch.on_note(note)
    with opened(input, output, plan, name=options.name, only_new=options.only_new) as state:
        take_up_failed(state, options.retry_failed)
        if is_finished(state):
            return _summary(state, "finished", "", had_finished=True)
        return _Run(client, table, plan, state, options, watch).run()


def _summary(state: CampaignState, end: End, reason: str, *, had_finished: bool = False) -> Summary:
    about, counts, left_out = state.about, state.counts(), state.left_out_count()
    return Summary(
        end=end,
        reason=reason,
        had_finished=had_finished,
        done=counts.done,
        failed=counts.failed,
        not_run=None if about.rows is None else about.rows - counts.done - left_out,
        left_out=left_out,
        by_code=counts.by_code,
        by_host=counts.by_host,
        seconds=about.seconds,
        tokens=about.tokens,
    )


class _Run:
    """One run of a campaign, with its state open and locked."""

    def __init__(
        self, client: Any, table: Table, plan: Plan, state: CampaignState, options: Options, watch: Watch
    ) -> None:
        self._client = client
        self._table = table
        self._plan = plan
        self._state = state
        self._options = options
        self._watch = watch
        about = state.about
        self._stamp = stamp(about.input)
        self._tally = Tally.of(state.counts())
        self._seconds = about.seconds
        self._rate = Rate(time.monotonic())
        self._count = RowCount(table, about.input)
        # A client of the caller's own may have no app.
        self._control = CampaignControl(client.app, about.id) if hasattr(client, "app") else None
        self._bottleneck = Bottleneck(client, options.priority, options.window)
        self._earlier = answered_rows(plan, options.only_new) if options.only_new else None
        self._progress: Progress | None = None
        self._end: End = "finished"
        self._reason = ""

    def run(self) -> Summary:
        self._register()
        rows = self._rows()
        while not self._passes(rows):
            self._state.update(sent=0)
            rows = self._rows()
        if self._end != "interrupted":
            self._finish(rows)
        self._report_end()
        return _summary(self._state, self._end, self._reason)

    def _rows(self) -> CampaignRows:
        return CampaignRows(
            self._client,
            self._table,
            self._plan,
            self._state,
            self._tally,
            answered_earlier=self._earlier,
            headers=self._control.headers if self._control else {},
            on_note=self._watch.on_note,
        )

    def _passes(self, rows: CampaignRows) -> bool:
        """Go through the input. False if jobs were lost: then it must be gone through again."""
        window = _Window(self._client, rows, window=self._options.window, priority=self._options.priority)
        before = time.monotonic()
        try:
            for answers in window.turns():
                now = time.monotonic()
                self._seconds += 0.0 if window.is_paused else now - before
                before = now
                rows.save(answers, self._seconds)
                self._rate.add(len(answers), now)
                self._steer(window, rows)
                self._report(window, rows, now)
        except JobsLost as lost:
            self._watch.on_note(f"{lost} They are sent again.")
            return False
        return True

    def _steer(self, window: _Window, rows: CampaignRows) -> None:
        """Go on, pause or stop, as the user, others and the limits want."""
        wanted = self._control.state() if self._control else "running"
        window.is_paused = wanted == "paused"
        if self._watch.is_interrupted():
            self._end, self._reason, window.is_stopped = "interrupted", _INTERRUPTED, True
        elif wanted == "canceled":
            self._end, self._reason, window.is_draining = "canceled", _CANCELED, True
        elif not window.is_draining and (reason := self._limit(rows)):
            self._end, self._reason, window.is_draining = "limit", reason, True
            self._watch.on_note("A limit is reached: nothing more is sent, and jobs in flight are awaited.")

    def _limit(self, rows: CampaignRows) -> str | None:
        return self._options.limits.reached(
            done=self._tally.done, failed=self._tally.failed, seconds=self._seconds, tokens=rows.tokens
        )

    def _report(self, window: _Window, rows: CampaignRows, now: float) -> None:
        self._progress = Progress(
            rows=self._count.rows if rows.rows is None else rows.rows,
            done=self._tally.done,
            left_out=rows.left_out,
            by_code=dict(self._tally.by_code.most_common()),
            by_host=dict(self._tally.by_host.most_common(20)),
            in_flight=window.in_flight,
            rate=self._rate.per_s,
            bound=self._bottleneck.bound(window.in_flight, now),
            trouble=window.trouble,
            is_paused=window.is_paused,
        )
        if self._control:
            self._control.report(self._progress.reported())
        self._watch.on_progress(self._progress)

    def _finish(self, rows: CampaignRows) -> None:
        """Write the output, then note that all is done: a run that is killed in between writes it again."""
        # Read to its end, it also knows all its columns.
        total = sum(1 for _ in self._table) if rows.rows is None else rows.rows
        with self._state.transaction():
            self._state.cut(total)
            self._state.update(rows=total, canceled=self._end == "canceled")
        write_output(self._state.about.output, self._table, self._plan, self._state)
        if self._end != "canceled" and self._state.counts().done + self._state.left_out_count() == total:
            self._end, self._reason = "finished", ""
            self._state.update(finished=self._stamp, retrying=None)

    def _register(self) -> None:
        if self._control:
            about, task = self._state.about, self._plan.task.removeprefix("idefics.")
            self._control.register(
                CampaignInfo(
                    name=about.name,
                    task=f"idefics.{task}",
                    input=base_name(about.input),
                    output=base_name(about.output),
                    host=this_host(),
                    started=about.created,
                )
            )

    def _report_end(self) -> None:
        if self._control:
            progress = self._progress.reported() if self._progress else CampaignProgress()
            how: Literal["finished", "canceled", "stopped"]
            how = self._end if self._end in ("finished", "canceled") else "stopped"
            self._control.end(how, progress)
