"""The command `idefics-jobs` and its options."""

from __future__ import annotations

import os

import click

from ..protocol import QUEUE
from ..schema import schema
from .batch import batch
from .calibrate import calibrate_output
from .campaigns import campaigns
from .connection import open_client
from .console import echo_json
from .deliveries import deliveries
from .evaluate import evaluate_output
from .failed import failed
from .jobs import cancel, result, status, submit, watch
from .models import show_models
from .queue import show_queue
from .report import report
from .review import review
from .run import run
from .top import top
from .verify import verify


@click.group()
@click.version_option(package_name="idefics-jobs")
@click.option("--broker", help="Redis URL of the queues. [env: IDEFICS_BROKER_URL]")
@click.option("--results", help="Redis URL of the results. [env: IDEFICS_RESULT_BACKEND]")
@click.option("--queue", help=f"The jobs' queue. [env: IDEFICS_QUEUE; default: {QUEUE}]")
@click.option("--model", help="Of several models the one to ask, by its name or id; `models` lists them.")
@click.pass_context
def main(context: click.Context, broker: str | None, results: str | None, queue: str | None, model: str | None) -> None:
    """Jobs for the IDEFICS workers.

    Tables and colors appear on a terminal only, and not where NO_COLOR is set. --json is for programs.
    """
    if queue and model:
        raise click.UsageError("--queue and --model: give one of them.")
    chosen = queue or (None if model else os.environ.get("IDEFICS_QUEUE")) or None
    context.obj = lambda: open_client(broker, results, chosen, model)


@click.command("schema")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON on one line.")
def print_schema(as_json: bool) -> None:
    """Print the JSON Schema of every task's arguments, of the result and of a callback's event.

    \b
    idefics-jobs schema > schema.json
    """
    echo_json(schema(), on_one_line=as_json)


for command in (
    submit,
    result,
    status,
    watch,
    cancel,
    show_queue,
    top,
    show_models,
    batch,
    run,
    campaigns,
    report,
    review,
    evaluate_output,
    calibrate_output,
    failed,
    deliveries,
    verify,
    print_schema,
):
    main.add_command(command)
