"""`idefics-jobs deliveries`: which callbacks went out, which wait, and once more those that you choose."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Any

import click

from .outbox import STATES, Delivery, Outbox, connect
from .printable import echo, escaped


@click.group()
@click.pass_context
def deliveries(context: click.Context) -> None:
    """The callbacks' deliveries."""
    client = context.obj
    context.obj = lambda: Outbox(connect(client().app))


@deliveries.command("ls")
@click.option("--state", type=click.Choice(STATES), help="Only these. Without it: all, pending ones first.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True, help="Lines of each state.")
@click.pass_obj
def list_deliveries(outbox: Any, state: str | None, limit: int) -> None:
    """List deliveries: id, state, attempts, the last one's time, event, job, host, what the last attempt met."""
    found = outbox()
    for each in [state] if state else STATES:
        for delivery in found.listed(each, limit):
            click.echo(line(delivery))
    click.echo(" ".join(f"{name}={count}" for name, count in sorted(found.counts().items())), err=True)


def line(delivery: Delivery) -> str:
    """One for a listing. Of the URL its host alone: the rest may be a secret."""
    columns = (
        delivery.id,
        delivery.state,
        str(delivery.attempts),
        _moment(delivery.changed),
        delivery.event,
        delivery.job or "-",
        delivery.host,
        delivery.note or "-",
    )
    return "\t".join(map(escaped, columns))


@deliveries.command()
@click.pass_obj
def hosts(outbox: Any) -> None:
    """List the hosts with pending deliveries and their bytes, the largest first."""
    for host, size in outbox().bytes().items():
        click.echo(f"{escaped(host)}\t{size}")


@deliveries.command()
@click.argument("ids", nargs=-1)
@click.option("--failed", is_flag=True, help="All that have failed.")
@click.pass_obj
def replay(outbox: Any, ids: tuple[str, ...], failed: bool) -> None:
    """Send deliveries again, under the same ids, from the first attempt on; enables their URLs.

    Exits with 1 if one is not there (any more).
    """
    if not ids and not failed:
        raise click.UsageError("Name deliveries (`idefics-jobs deliveries ls`), or give --failed.")
    found = outbox()
    chosen = [*ids, *(found.ids("failed") if failed else ())]
    unknown = [id for id in chosen if not found.replay(id)]
    click.echo(f"{len(chosen) - len(unknown)} go out again.")
    for id in unknown:
        echo(f"{id} is not there (any more).", err=True)
    if unknown:
        sys.exit(1)


@deliveries.command()
@click.pass_obj
def disabled(outbox: Any) -> None:
    """List the URLs that answered 410 (Gone), and until when they get nothing. They may hold secrets."""
    for url, until in outbox().disabled().items():
        click.echo(f"{escaped(url)}\t{_moment(until)}")


@deliveries.command()
@click.argument("url")
@click.pass_obj
def enable(outbox: Any, url: str) -> None:
    """Let a URL that answered 410 get callbacks again."""
    if not outbox().enable(url):
        raise click.ClickException("That URL is not disabled: `idefics-jobs deliveries disabled` lists those that are.")


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
