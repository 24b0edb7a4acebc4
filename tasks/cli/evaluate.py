"""`idefics-jobs eval`: a campaign's answers against the truth, and two outputs against each other."""

from __future__ import annotations

import sqlite3
from typing import Any

import click

from ..campaign.evaluation import Columns, ComparedOutputs, EvaluatedOutput, Kind, compare, evaluate
from ..campaign.evaluation.outputs import Output, open_output, write_evaluation
from ..campaign.evaluation.page import MOST_ROWS
from ..campaign.report import Thumbnails
from ..errors import IdeficsError
from .console import CommandError, echo, echo_json
from .evaluation_tables import show_comparison, show_evaluation

MISSING = "The evaluation needs numpy and scipy: pip install 'idefics-jobs[evaluate]'."


@click.command("eval")
@click.argument("output")
@click.argument("other", required=False)
@click.option("--truth", required=True, metavar="COLUMN", help="The right answer; a JSON list where several are right.")
@click.option("--separator", metavar="TEXT", help="Between the right answers of a cell, as `|`.")
@click.option("--answer", metavar="COLUMN", default="", help="The answers.  [default: label, or else text]")
@click.option("--score", metavar="COLUMN", help="The answers' probabilities.  [default: score, if it is there]")
@click.option("--id", metavar="COLUMN", help="Joins the rows of two outputs.  [default: by their order]")
@click.option(
    "--as", "kind", type=click.Choice(["labels", "text"]), help="What the answers are.  [default: labels with a score]"
)
@click.option("--rows", type=click.IntRange(0), default=20, show_default=True, help="Mistakes or differences to print.")
@click.option("--seed", type=click.IntRange(0), default=20, show_default=True, help="Of the bootstrap.")
@click.option("-o", "--page", metavar="FILE", help="Write a page with plots and pictures, too.")
@click.option("--image", metavar="COLUMN", help="The page's pictures, if no OUTPUT.campaign tells it.")
@click.option(
    "--thumbnails", type=click.Choice([each.value for each in Thumbnails]), default=Thumbnails.LOCAL.value,
    show_default=True, help="`fetch`: of pictures on the web, too, which this machine downloads.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def evaluate_output(
    output: str,
    other: str | None,
    kind: Kind | None,
    rows: int,
    seed: int,
    page: str | None,
    thumbnails: str,
    as_json: bool,
    **columns: Any,
) -> None:
    """How good the answers of a campaign's OUTPUT are; or which of OUTPUT and OTHER is better.

    Labels of `classify` give accuracy, precision and recall, the confusion matrix and the calibration of their
    probabilities; texts the share that matches the truth exactly, and normalised as for VQA v2. Two outputs are
    compared row by row, by McNemar's test. Intervals are 95 %, by the bootstrap.

    A row without an answer counts as wrong in one number and is left out of another. A row without a truth is left out
    of all.

    \b
    idefics-jobs eval labels.csv --truth category
    idefics-jobs eval small.parquet large.parquet --truth category --id sku -o both.html
    """
    keep = max(rows, MOST_ROWS) if page else rows
    try:
        opened = [open_output(path, Columns(**columns), kind) for path in (output, other) if path is not None]
        found = _found(opened, keep, seed)
        if page:
            title = output if other is None else f"A: {output} · B: {other}"
            pictures = write_evaluation(page, found, opened[0], title, Thumbnails(thumbnails))
    except sqlite3.Error as error:
        raise CommandError(f"Cannot read the campaign's file beside the output: {error}.") from None
    except IdeficsError as error:
        raise CommandError(str(error)) from None
    except ModuleNotFoundError as error:
        raise CommandError(MISSING) from error
    if as_json:
        echo_json(found.as_dict())
    elif isinstance(found, EvaluatedOutput):
        show_evaluation(found, rows)
    else:
        show_comparison(found, rows)
    if page:
        echo(f"{page}: written, {pictures:,} thumbnails", err=True)


def _found(outputs: list[Output], keep: int, seed: int) -> EvaluatedOutput | ComparedOutputs:
    first = outputs[0]
    if len(outputs) == 1:
        return evaluate(first.table, first.columns, keep=keep, seed=seed)
    second = outputs[1]
    return compare(first.table, second.table, first.columns, second.columns, keep=keep, seed=seed)
