"""`idefics-jobs report`: a campaign's output as one page for a browser."""

from __future__ import annotations

import sqlite3
from pathlib import PurePath

import click

from ..campaign.report import ROWS, Thumbnails, write_report
from ..campaign.tables.files import is_url
from ..errors import IdeficsError
from .console import CommandError, echo, echo_json, json_line_option


@click.command("report")
@click.argument("output")
@click.option("-o", "--page", metavar="FILE", help="The page. [default: OUTPUT with .html]")
@click.option(
    "--thumbnails",
    type=click.Choice([each.value for each in Thumbnails]),
    default=Thumbnails.LOCAL.value,
    show_default=True,
    help="`local`: small copies of the pictures that are at hand, and links to those on the web. `fetch`: this machine "
    "downloads those on the web, too. `none`: links alone.",
)
@click.option(
    "--rows",
    type=click.IntRange(1),
    default=ROWS,
    show_default=True,
    help="Rows on the page: a sample of more.",
)
@click.option("--image", metavar="COLUMN", help="The column with pictures, if no OUTPUT.campaign tells it.")
@json_line_option
def report(output: str, page: str | None, thumbnails: str, rows: int, image: str | None, as_json: bool) -> None:
    """Write a page about a campaign: what was asked, figures, plots, and its rows to search, filter and sort.

    OUTPUT is a table that `idefics-jobs run` has written; `OUTPUT.campaign` beside it adds prompts and times. The page
    is one file that loads nothing when it is opened, so it tells no picture's host who reads it.

    \b
    idefics-jobs report captions.csv
    idefics-jobs report captions.parquet -o night.html --thumbnails fetch
    """
    name = page or _page_of(output)
    try:
        written = write_report(output, name, thumbnails=Thumbnails(thumbnails), rows=rows, image=image)
    except sqlite3.Error as error:
        raise CommandError(f"Cannot read {output}.campaign: {error}.") from None
    except IdeficsError as error:
        raise CommandError(str(error)) from None
    if as_json:
        told = {"page": name, "rows": written.rows, "shown": written.shown, "thumbnails": written.thumbnails}
        echo_json(told, on_one_line=True)
    else:
        echo(f"{name}: {written.shown:,} of {written.rows:,} rows, {written.thumbnails:,} thumbnails", err=True)


def _page_of(output: str) -> str:
    """The page beside an output; in the current folder for one at a URL."""
    path = PurePath(output.partition("?")[0] if is_url(output) else output)
    name = f"{path.name.partition('.')[0] or 'report'}.html"
    return name if is_url(output) else str(path.with_name(name))
