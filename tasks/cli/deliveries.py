"""`idefics-jobs deliveries`: lists callbacks' deliveries and sends them again."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Any

import click

from ..outbox import STATES, Delivery, outbox_of
from .console import CommandError, echo, echo_json, echo_rows, json_option


@click.group()
@click.pass_context
def deliveries(context: click.Context) -> None:
    """The callbacks' deliveries."""
    client = context.obj
    context.obj = lambda: outbox_of(client().app)


@deliveries.command("ls")
@click.option("--state", type=click.Choice(STATES), help="Only these. Without it: all, pending ones first.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True, help="Lines of each state.")
@json_option
@click.pass_obj
def list_deliveries(outbox: Any, state: str | None, limit: int, as_json: bool) -> None:
    """List deliveries: id, state, attempts, time of the last change, event, job, host, result of the last attempt.

    The numbers of each state follow on standard error.

    \b
    idefics-jobs deliveries ls --state failed
    """
    found = outbox()
    listed = (delivery for each in ([state] if state else STATES) for delivery in found.listed(each, limit))
    if as_json:
        for delivery in listed:
            echo_json(as_shown(delivery), on_one_line=True)
    else:
        echo_rows(("id", "state", "attempts", "changed", "event", "job", "host", "note"), map(row, listed))
    echo(" ".join(f"{name}={count}" for name, count in sorted(found.counts().items())), err=True)


def as_shown(delivery: Delivery) -> dict[str, Any]:
    """A delivery for JSON, times in unix seconds. Of the URL only the host: the rest may be a secret."""
    shown = {name: getattr(delivery, name) for name in ("id", "state", "attempts", "created", "changed", "event")}
    return {**shown, "job": delivery.job or None, "host": delivery.host, "note": delivery.note or None}


def row(delivery: Delivery) -> tuple[str, ...]:
    """A delivery's cells in a listing. Of the URL only the host: the rest may be a secret."""
    return (
        delivery.id,
        delivery.state,
        str(delivery.attempts),
        _moment(delivery.changed),
        delivery.event,
        delivery.job or "-",
        delivery.host,
        delivery.note or "-",
    )


@deliveries.command()
@json_option
@click.pass_obj
def hosts(outbox: Any, as_json: bool) -> None:
    """List the hosts with pending deliveries and their bytes, the largest first.

    \b
    idefics-jobs deliveries hosts
    """
    found = outbox().bytes().items()
    if as_json:
        for host, size in found:
            echo_json({"host": host, "bytes": size}, on_one_line=True)
    else:
        echo_rows(("host", "bytes"), ((host, str(size)) for host, size in found))


@deliveries.command()
@click.argument("ids", nargs=-1)
@click.option("--failed", is_flag=True, help="All that have failed.")
@json_option
@click.pass_obj
def replay(outbox: Any, ids: tuple[str, ...], failed: bool, as_json: bool) -> None:
    """Send deliveries again, under the same ids, from the first attempt on; enables their URLs.

    Exits with 1 if one does not exist (any more).

    \b
    idefics-jobs deliveries replay --failed
    """
    if not ids and not failed:
        raise click.UsageError("Name deliveries (`idefics-jobs deliveries ls`), or give --failed.")
    found = outbox()
    chosen = [*ids, *(found.ids("failed") if failed else ())]
    sent = [(id, found.replay(id)) for id in chosen]
    unknown = [id for id, is_sent in sent if not is_sent]
    if as_json:
        for id, is_sent in sent:
            echo_json({"id": id, "sent": bool(is_sent)}, on_one_line=True)
    else:
        echo(f"{len(chosen) - len(unknown)} go out again.")
        for id in unknown:
            echo(f"{id} does not exist (any more).", err=True)
    if unknown:
        sys.exit(1)


@deliveries.command()
@json_option
@click.pass_obj
def disabled(outbox: Any, as_json: bool) -> None:
    """List the URLs that answered 410 (Gone), and until when they are disabled. They may hold secrets.

    \b
    idefics-jobs deliveries disabled
    """
    found = outbox().disabled().items()
    if as_json:
        for url, until in found:
            echo_json({"url": url, "until": until}, on_one_line=True)
    else:
        echo_rows(("url", "until"), ((url, _moment(until)) for url, until in found))


@deliveries.command()
@click.argument("url")
@click.pass_obj
def enable(outbox: Any, url: str) -> None:
    """Let a URL that answered 410 get callbacks again.

    \b
    idefics-jobs deliveries enable https://shop.example/hook
    """
    if not outbox().enable(url):
        raise CommandError("That URL is not disabled: `idefics-jobs deliveries disabled` lists those that are.")


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
