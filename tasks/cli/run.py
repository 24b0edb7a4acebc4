"""`idefics-jobs run`: a campaign over a table."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Sequence
from typing import Any

import click
from redis.exceptions import RedisError

from ..campaign import CampaignError, Limits, Options, Plan, Summary, Watch
from ..campaign import run as run_campaign
from ..campaign.plan import assignments
from ..errors import ModelNotFound
from ..job_window import PRIORITY, WINDOW
from .campaign_progress import CampaignDisplay, counts
from .console import CommandError, echo, echo_json
from .forecast import forecast, show
from .jobs import fail
from .stopping import INTERRUPTED, Stop
from .waiting import watched

#: The exit code of a campaign that a limit or a cancellation has stopped.
STOPPED = 3


@click.command("run")
@click.argument("input")
@click.argument("output")
@click.option("--task", required=True, help="caption, answer, classify, write, complete or chat.")
@click.option("--image", help="The column with the picture.")
@click.option("--id", help="The column that identifies a row.")
@click.option("--set", "sets", multiple=True, metavar="FIELD=TEXT", help="A field; {column} is a cell.")
@click.option("--column", "columns", multiple=True, metavar="NAME=FIELD", help="A column of the output.")
@click.option("--images-in", help="A folder: the column IMAGE names files in it, which are sent.")
@click.option("--image-paths", is_flag=True, help="It names files below the workers' IDEFICS_IMAGE_ROOT.")
@click.option("--encoding", help="Of an INPUT that is a text. [default: recognized]")
@click.option("--delimiter", help="Of CSV. [default: recognized by the header]")
@click.option("--window", type=click.IntRange(1), default=WINDOW, show_default=True, help="Jobs in flight at most.")
@click.option("--priority", type=click.IntRange(0, 9), default=PRIORITY, show_default=True, help="9 is last.")
@click.option("--max-failures", help="Stop after so many failed rows, or a share of the answers, as 5%.")
@click.option("--budget-hours", type=click.FloatRange(min=0), help="Stop after so many hours, all runs together.")
@click.option("--budget-tokens", type=click.IntRange(0), help="Stop after so many tokens, those of prompts too.")
@click.option("--retry-failed", is_flag=True, help="Run failed rows again.")
@click.option("--code", "codes", multiple=True, help="Of failed rows, those with this code; repeatable.")
@click.option(
    "--only-new",
    multiple=True,
    metavar="EARLIER",
    help="Leave out the rows that have an answer in this earlier output, by --id or else --image; repeatable.",
)
@click.option("--dry-run", is_flag=True, help="Check all rows, run a sample and forecast the campaign; OUTPUT stays.")
@click.option("--sample", type=click.IntRange(1), help="Rows of --dry-run's sample.  [default: 1 %, 500 to 5,000]")
@click.option("--gpu-hour-price", type=click.FloatRange(min=0), help="Of one worker, for --dry-run's cost.")
@click.option("--name", default="", help="As `idefics-jobs campaigns` shows it. [default: OUTPUT]")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="At the end print the counts as JSON on standard output; with --dry-run the forecast.",
)
@click.pass_obj
def run(
    client: Any,
    input: str,
    output: str,
    task: str,
    image: str | None,
    id: str | None,
    sets: Sequence[str],
    columns: Sequence[str],
    images_in: str | None,
    image_paths: bool,
    encoding: str | None,
    delimiter: str | None,
    window: int,
    priority: int,
    max_failures: str | None,
    budget_hours: float | None,
    budget_tokens: int | None,
    retry_failed: bool,
    codes: Sequence[str],
    only_new: Sequence[str],
    dry_run: bool,
    sample: int | None,
    gpu_hour_price: float | None,
    name: str,
    as_json: bool,
) -> None:
    """Run a task for each row of a table, and write the table with the answers.

    INPUT and OUTPUT are CSV, TSV, JSONL or Parquet by their suffixes; INPUT also Arrow, a folder of pictures or a
    WebDataset tar, or several files of a kind ("part-*.parquet", "{00..99}.tar"); both may be URLs (s3://, gs://,
    https://). Rows keep their order. A failed row has its error in the columns error_code and error.

    The state is in OUTPUT.campaign. After any interruption the same command goes on where it stopped. Exit codes: 0
    when all rows have run, 3 if a limit or a cancellation stopped it, 130 after Ctrl-C.

    \b
    idefics-jobs run shoes.csv captions.csv --task caption --image url
    idefics-jobs run shoes.csv captions.csv --task caption --image url --dry-run
    idefics-jobs run shoes.csv colors.parquet --task answer --image url --set question="What colour is {name}?"
    idefics-jobs run shoes.csv captions.csv --task caption --image url --retry-failed --code image_unreachable
    """
    if codes and not retry_failed:
        raise click.UsageError("--code chooses among the rows of --retry-failed: give both.")
    if not dry_run and (sample is not None or gpu_hour_price is not None):
        raise click.UsageError("--sample and --gpu-hour-price belong to --dry-run.")
    try:
        plan = Plan(
            task=task,
            image=image,
            id=id,
            set=assignments(sets, "--set"),
            columns=_single(assignments(columns, "--column")),
            images_in=images_in,
            image_paths=image_paths,
            encoding=encoding,
            delimiter=delimiter,
        )
        if dry_run:
            found = forecast(client(), input, plan, window=window, priority=priority, sample=sample)
            show(found, gpu_hour_price, as_json=as_json)
            return
        options = Options(
            name=name,
            window=window,
            priority=priority,
            limits=Limits(max_failures, budget_hours, budget_tokens),
            retry_failed=codes if retry_failed else None,
            only_new=only_new,
        )
        summary = _run(client(), input, output, plan, options)
    except (CampaignError, ModelNotFound) as error:
        fail(error)
    except RedisError as error:
        raise CommandError(f"Redis refuses: {error}") from None
    except sqlite3.Error as error:
        raise CommandError(f"The campaign's state cannot be written: {error}. Run the same command to go on.") from None
    if as_json:
        echo_json(summary.as_dict(), on_one_line=True)
    echo(told(summary, output), err=True)
    sys.exit({"finished": 0, "interrupted": INTERRUPTED}.get(summary.end, STOPPED))


def _single(found: dict[str, str | list[str]]) -> dict[str, str]:
    for name, value in found.items():
        if not isinstance(value, str):
            raise click.UsageError(f"--column {name} is given more than once.")
    return {name: str(value) for name, value in found.items()}


def _run(client: Any, input: str, output: str, plan: Plan, options: Options) -> Summary:
    display = CampaignDisplay()
    try:
        with Stop() as stop, watched(client, display.note):
            watch = Watch(on_progress=display.tell, on_note=display.note, is_interrupted=lambda: stop.is_asked)
            return run_campaign(client, input, output, plan, options, watch)
    finally:
        display.close()


def told(summary: Summary, output: str) -> str:
    """What has come of a campaign, for people."""
    failed = f"{summary.failed:,} of them failed"
    if summary.by_code:
        failed += f" ({counts(summary.by_code)})"
    text = f"{summary.done:,} rows done, {failed}"
    if summary.left_out:
        text += f"; {summary.left_out:,} rows are left out, which have an answer in an earlier output"
    if summary.end != "finished":
        left = f"; {summary.not_run:,} rows have not run" if summary.not_run else ""
        return f"Stopped: {text}{left}. {summary.reason}"
    text = f"{'Finished already' if summary.had_finished else 'Finished'}: {text}. The output is {output}."
    return f"{text} --retry-failed runs the failed rows again." if summary.failed else text
