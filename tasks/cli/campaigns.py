"""`idefics-jobs campaigns`: the campaigns on a broker, seen and steered from any machine."""

from __future__ import annotations

import datetime
import sqlite3
from collections.abc import Sequence
from typing import Any

import click

from ..campaign.directory import Campaigns
from ..campaign.record import CampaignRecord
from ..errors import IdeficsError
from ..steering import State
from .campaign_failures import failures
from .console import BrokerGroup, CommandError, duration, echo, echo_json, echo_rows, json_line_option, json_option
from .jobs import fail

COLUMNS = ("id", "name", "status", "done", "failed", "rows/s", "time left", "host", "last report")


class _Group(BrokerGroup):
    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except sqlite3.Error as error:
            raise CommandError(f"The campaign's state cannot be read: {error}") from None
        except IdeficsError as error:
            fail(error)


@click.group(cls=_Group)
def campaigns() -> None:
    """Campaigns of all producers on this broker: list, pause, resume and cancel them.

    A campaign is named by its id, the beginning of its id, or its name.
    """


campaigns.add_command(failures)


@campaigns.command("ls")
@json_option
@click.pass_obj
def ls(client: Any, as_json: bool) -> None:
    """List campaigns, the one that reported last first.

    The status is running, paused, canceled, finished, stopped (its producer was interrupted or reached a limit; the
    same command goes on) or silent (its producer has not reported for 30 seconds). A campaign is listed for a week
    after its last report.

    \b
    idefics-jobs campaigns ls
    """
    found = Campaigns(client().app).all()
    if as_json:
        for each in found:
            echo_json(each.as_dict(), on_one_line=True)
        return
    echo_rows(COLUMNS, map(_cells, found))


@campaigns.command("show")
@click.argument("campaign")
@json_line_option
@click.pass_obj
def show(client: Any, campaign: str, as_json: bool) -> None:
    """Show a campaign: its progress, its failures by code, and what limits its rate.

    \b
    idefics-jobs campaigns show shoes
    """
    found = Campaigns(client().app).get(campaign)
    if as_json:
        echo_json(found.as_dict(), on_one_line=True)
    else:
        echo_rows(("campaign", found.info.name), _rows(found))


@campaigns.command("pause")
@click.argument("campaigns", nargs=-1, required=True)
@json_option
@click.pass_obj
def pause(client: Any, campaigns: Sequence[str], as_json: bool) -> None:
    """Pause campaigns: within 2 seconds none of their jobs starts any more, and no more are sent.

    Jobs that run end. The others wait in the queue or for their time, and none is lost.

    \b
    idefics-jobs campaigns pause shoes
    """
    _steer(client, campaigns, "paused", as_json)


@campaigns.command("resume")
@click.argument("campaigns", nargs=-1, required=True)
@json_option
@click.pass_obj
def resume(client: Any, campaigns: Sequence[str], as_json: bool) -> None:
    """Resume paused campaigns. Jobs that were held back run within about 2 seconds, and all within 30.

    \b
    idefics-jobs campaigns resume shoes
    """
    _steer(client, campaigns, "running", as_json)


@campaigns.command("cancel")
@click.argument("campaigns", nargs=-1, required=True)
@json_option
@click.pass_obj
def cancel(client: Any, campaigns: Sequence[str], as_json: bool) -> None:
    """Cancel campaigns: their jobs end as canceled, and their producers write the answers so far.

    Running jobs end at their next step, waiting ones when a worker takes them, and those held back by a pause within
    about 2 seconds, all within 30. The command that started a campaign takes it up again.

    \b
    idefics-jobs campaigns cancel shoes
    """
    _steer(client, campaigns, "canceled", as_json)


def _steer(client: Any, asked: Sequence[str], state: State, as_json: bool) -> None:
    known = Campaigns(client().app)
    # All are found before one is changed.
    for found in [known.get(each) for each in asked]:
        has_ended = found.status in ("finished", "canceled")
        if not has_ended:
            known.want(found.id, state)
        if as_json:
            echo_json({"id": found.id, "requested": not has_ended, "status": found.status}, on_one_line=True)
        else:
            echo(f"{found.info.name} ({found.id}) {_ENDED[found.status] if has_ended else _ORDERS[state]}")


_ENDED = {"finished": "has already finished", "canceled": "has already been canceled"}
_ORDERS: dict[State, str] = {"paused": "will pause", "running": "will go on", "canceled": "will be canceled"}


def _cells(found: CampaignRecord) -> tuple[str, ...]:
    return (
        found.id,
        found.info.name,
        found.status,
        _done(found),
        f"{found.progress.failed:,}",
        f"{found.progress.rate:,.1f}",
        _left(found),
        found.info.host,
        f"{duration(found.age_s)} ago",
    )


def _rows(found: CampaignRecord) -> list[tuple[str, str]]:
    info, progress = found.info, found.progress
    started = datetime.datetime.fromtimestamp(info.started, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return [
        ("id", found.id),
        ("status", found.status),
        ("task", info.task),
        ("input", info.input),
        ("output", info.output),
        ("host", info.host),
        ("started", started),
        ("last report", f"{duration(found.age_s)} ago"),
        ("done", _done(found)),
        ("in flight", f"{progress.in_flight:,}"),
        ("rows/s", f"{progress.rate:,.1f}"),
        ("limited by", progress.bound or "-"),
        ("time left", _left(found)),
        ("failed", f"{progress.failed:,}"),
        *((f"failed, {code}", f"{count:,}") for code, count in progress.failures.items()),
    ]


def _done(found: CampaignRecord) -> str:
    rows = found.progress.rows
    return f"{found.progress.done:,}" + ("" if rows is None else f" of {rows:,}")


def _left(found: CampaignRecord) -> str:
    is_running = found.status == "running" and found.progress.left_s is not None
    return duration(found.progress.left_s or 0.0) if is_running else "-"
