"""`idefics-jobs eval`: a campaign's answers against the truth, and two outputs against each other."""

from __future__ import annotations

from typing import Any

import click

from ..campaign.errors import CampaignError
from ..campaign.evaluation import Columns, ComparedOutputs, EvaluatedOutput, Kind, compare, evaluate, find_columns
from ..campaign.tables import Table, open_table
from .console import CommandError, echo_json
from .evaluation_tables import show_comparison, show_evaluation

_MISSING = "The evaluation needs numpy and scipy: pip install 'idefics-jobs[evaluate]'."


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
@click.option("--rows", type=click.IntRange(0), default=20, show_default=True, help="Mistakes or differences to show.")
@click.option("--seed", type=click.IntRange(0), default=20, show_default=True, help="Of the bootstrap.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def evaluate_output(
    output: str,
    other: str | None,
    truth: str,
    separator: str | None,
    answer: str,
    score: str | None,
    id: str | None,
    kind: Kind | None,
    rows: int,
    seed: int,
    as_json: bool,
) -> None:
    """How good the answers of a campaign's OUTPUT are; or which of OUTPUT and OTHER is better.

    Labels of `classify` give accuracy, precision and recall, the confusion matrix and the calibration of their
    probabilities; texts the share that matches the truth exactly, and normalised as for VQA v2. Two outputs are
    compared row by row, by McNemar's test. Intervals are 95 %, by the bootstrap.

    Where an answer is missing, the row counts as wrong in one number and is left out of another. A row without a truth
    is left out of all.

    \b
    idefics-jobs eval labels.csv --truth category
    idefics-jobs eval small.parquet large.parquet --truth category --id sku
    """
    wanted = Columns(truth=truth, answer=answer, score=score, id=id, separator=separator)
    options: dict[str, Any] = {"keep": rows, "seed": seed}
    try:
        found: EvaluatedOutput | ComparedOutputs
        if other is None:
            found = evaluate(*_opened(output, wanted, kind), **options)
        else:
            (a, of_a), (b, of_b) = _opened(output, wanted, kind), _opened(other, wanted, kind)
            found = compare(a, b, of_a, of_b, **options)
    except CampaignError as error:
        raise CommandError(str(error)) from None
    except ModuleNotFoundError as error:
        raise CommandError(_MISSING) from error
    if as_json:
        echo_json(found.as_dict())
    elif isinstance(found, EvaluatedOutput):
        show_evaluation(found, rows)
    else:
        show_comparison(found, rows)


def _opened(path: str, wanted: Columns, kind: Kind | None) -> tuple[Table, Columns]:
    table = open_table(path)
    return table, find_columns(table.columns, wanted, kind)
