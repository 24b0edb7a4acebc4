"""Opens the outputs that are evaluated, with what `OUTPUT.campaign` knows of them, and writes the page."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from ...results import Result
from ..page_file import write_page
from ..plan import Plan
from ..report.columns import OutputColumns, guessed, of_plan
from ..report.pictures import PictureAdder, Thumbnails, pictures_folder, possible
from ..state import CampaignState, state_path
from ..tables import Table, open_table, values_of
from . import ComparedOutputs, EvaluatedOutput
from .page import page, page_data, shown_rows
from .rows import Columns, Kind, find_columns


@dataclass(frozen=True)
class Output:
    """A table of answers."""

    path: str
    table: Table
    columns: Columns
    #: The campaign's plan; None without its file.
    plan: Plan | None


def open_output(path: str, wanted: Columns, kind: Kind | None = None) -> Output:
    """An output and the columns to read: those `wanted`, then the campaign's own, then the usual ones.

    Raises CampaignError if the table, the campaign's file or a column cannot be used, sqlite3.Error if that file fails.
    """
    table, plan = open_table(path), _plan(path)
    if plan is not None:
        of_output = of_plan(plan, table.columns)
    else:
        of_output = guessed(table.columns, map(values_of, itertools.islice(table, 20)))
    chosen = _with(wanted, of_output)
    if chosen.score and not wanted.score and kind is None:
        # Texts have a confidence too.
        kind = "labels" if chosen.answer == of_output.by_field.get("label") or "score" in of_output.by_field else "text"
    return Output(path, table, find_columns(table.columns, chosen, kind), plan)


def models_of(output: Output) -> list[tuple[str, str | None]]:
    """The id and revision of each model that answered, by the campaign's file, or by the columns `model_id` and
    `model_revision` of exported decisions; none without either."""
    path = state_path(output.path)
    if not path.exists():
        return _models_in(output.table) if "model_id" in output.table.columns else []
    with CampaignState.read(path) as state:
        answers = (answer.outcome for answer in state.answers() if answer.code is None)
        return sorted({(each.model.id, each.model.revision) for each in answers if isinstance(each, Result)}, key=str)


def _models_in(table: Table) -> list[tuple[str, str | None]]:
    found = {(str(row.get("model_id") or ""), row.get("model_revision") or None) for row in map(values_of, table)}
    return sorted((each for each in found if each[0]), key=str)


def _plan(output: str) -> Plan | None:
    path = state_path(output)
    if not path.exists():
        return None
    with CampaignState.read(path) as state:
        return Plan.from_dict(state.about.plan)


def _with(wanted: Columns, of_output: OutputColumns) -> Columns:
    """The columns with the output's own where none is wanted."""
    held = of_output.by_field
    return replace(
        wanted,
        answer=wanted.answer or held.get("label") or held.get("text") or "",
        score=wanted.score or (None if wanted.answer else held.get("score") or held.get("confidence")),
        error=held.get("error_code"),
        image=wanted.image or of_output.image,
    )


def write_evaluation(
    path: str, found: EvaluatedOutput | ComparedOutputs, output: Output, title: str, thumbnails: Thumbnails
) -> int:
    """Write the page about an output, or about two of which `output` is the first. Returns its thumbnails' number.

    Raises TableError if it cannot be written, ConfigurationError if `FETCH` needs Pillow and it is missing.
    """
    data = page_data(found, title)
    adder = PictureAdder(possible(thumbnails, data["notes"]), pictures_folder(output.path, output.plan))
    for item, row in zip(data["items"], shown_rows(found), strict=True):
        adder(item, row.image)
    adder.finish()
    write_page(path, page(data))
    return adder.shown
