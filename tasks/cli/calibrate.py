"""`idefics-jobs calibrate`: makes a model's confidences mean the share of right answers."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import click

from ..calibration import Calibration, CalibrationError, read_calibration
from ..campaign.evaluation import Columns, Kind
from ..campaign.evaluation.calibrating import CalibratedOutput, calibrate
from ..campaign.evaluation.outputs import Output, models_of, open_output
from ..errors import IdeficsError
from .console import CommandError, echo, echo_json
from .evaluate import MISSING


@click.command("calibrate")
@click.argument("output")
@click.option("--truth", required=True, metavar="COLUMN", help="The right answer; a JSON list where several are right.")
@click.option("--separator", metavar="TEXT", help="Between the right answers of a cell, as `|`.")
@click.option("--answer", metavar="COLUMN", default="", help="The answers.  [default: label, or else text]")
@click.option("--score", metavar="COLUMN", help="Their confidences.  [default: score or confidence]")
@click.option(
    "--as", "kind", type=click.Choice(["labels", "text"]), help="What the answers are.  [default: labels with a score]"
)
@click.option("--per-class", is_flag=True, help="Fit each label that has enough rows on its own, too.")
@click.option("--save", metavar="FILE", help="Write the calibration, for IDEFICS_CALIBRATION.")
@click.option("--for", "model", metavar="MODEL", help="The model's id.  [default: from OUTPUT.campaign or OUTPUT]")
@click.option("--revision", metavar="COMMIT", help="The model's revision.  [default: as the model's id, or any]")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def calibrate_output(
    output: str,
    kind: Kind | None,
    per_class: bool,
    save: str | None,
    model: str | None,
    revision: str | None,
    as_json: bool,
    **columns: Any,
) -> None:
    """Fit a model's confidences to the truth, on a campaign's OUTPUT with labelled rows.

    Afterwards a confidence of 0.8 means that four of five such answers are right. The numbers are cross-validated: each
    row is calibrated by a fit on other rows. Labels and texts have a fit each; a file that is there keeps the other
    one's.

    \b
    idefics-jobs calibrate labels.csv --truth category --save calibration.json
    IDEFICS_CALIBRATION=calibration.json celery -A worker.app worker
    """
    try:
        opened = open_output(output, Columns(**columns), kind)
        found = calibrate(opened.table, opened.columns, per_class=per_class)
        if save:
            _save(Path(save), opened, found, model, revision)
    except sqlite3.Error as error:
        raise CommandError(f"Cannot read the campaign's file beside the output: {error}.") from None
    except (IdeficsError, CalibrationError) as error:
        raise CommandError(str(error)) from None
    except ModuleNotFoundError as error:
        raise CommandError(MISSING) from error
    if as_json:
        echo_json(found.as_dict())
    else:
        _show(found)


def _save(path: Path, output: Output, found: CalibratedOutput, model: str | None, revision: str | None) -> None:
    """Write the calibration; the other kind's fit of the same model stays. Raises CalibrationError."""
    id, commit = (model, revision) if model else _only_model(output)
    known = read_calibration(path) if path.exists() else Calibration(model_id=id, model_revision=commit)
    if (known.model_id, known.model_revision) != (id, commit):
        raise CalibrationError(f"{path} is another model's calibration ({known.model_id}): write to another file.")
    updated = known.model_copy(update={output.columns.kind: found.fit})
    try:
        path.write_text(updated.model_dump_json(indent=2, exclude_defaults=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise CalibrationError(f"--save: {path} cannot be written: {error.strerror}.") from None


def _only_model(output: Output) -> tuple[str, str | None]:
    models = models_of(output)
    if len(models) == 1:
        return models[0]
    told = "the campaign's file is not beside the output" if not models else "several models answered"
    raise CalibrationError(f"--for: name the model that answered, since {told}.")


def _show(found: CalibratedOutput) -> None:
    curve = found.fit.curve
    echo(f"{found.fit.rows:,} answers, {found.accuracy.value:.1%} right")
    for name, estimate in (("before", found.before), ("after", found.after)):
        interval = "" if estimate.low is None else f" ({estimate.low:.3f} to {estimate.high:.3f})"
        echo(f"expected calibration error {name}: {estimate.value:.3f}{interval}")
    echo(f"temperature {curve.temperature:.3f}, offset {curve.offset:+.3f}")
    for label, own in found.fit.classes.items():
        echo(f"{label}: temperature {own.temperature:.3f}, offset {own.offset:+.3f}")
