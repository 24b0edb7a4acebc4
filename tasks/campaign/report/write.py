"""Writes an output's page."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ...page import BASE_SCRIPTS, BASE_STYLES, document, part
from ..errors import PlanError, TableError, nearest
from ..page_file import write_page
from ..plan import Plan
from ..record import public_id
from ..state import CampaignState, state_path
from ..tables import Table, open_table, values_of
from ..tables.files import is_url, suffixes
from .columns import OutputColumns, guessed, of_plan
from .data import MAX_OTHERS, Overview, Shown, overview, shown
from .pictures import PictureAdder, Thumbnails, pictures_folder, possible
from .rows import Campaign, output_rows

#: Rows on a page, unless another number is asked for.
ROWS = 5_000
#: Text tables: an output repeats all that such an input has.
_TEXT_TABLES = (".csv", ".tsv", ".tab", ".jsonl", ".ndjson")


@dataclass(frozen=True)
class Written:
    """What a page has."""

    #: Rows of the output, those on the page, and those of them with a thumbnail.
    rows: int
    shown: int
    thumbnails: int


def write_report(
    output: str,
    page: str,
    *,
    thumbnails: Thumbnails = Thumbnails.LOCAL,
    rows: int = ROWS,
    image: str | None = None,
) -> Written:
    """Write the page of a campaign's output, with what `OUTPUT.campaign` beside it has, if it is there.

    `image`: the column with pictures, of an output without that file. Raises TableError, PlanError or CampaignError
    where a file cannot be read or written, and ConfigurationError where `FETCH` needs Pillow and it is missing.
    """
    notes: list[str] = []
    thumbnails = possible(thumbnails, notes)
    table = open_table(output)
    with _campaign(output) as campaign:
        columns = _columns(table, campaign, image)
        first = overview(output_rows(table, campaign), columns, rows)
        adder = PictureAdder(thumbnails, pictures_folder(output, campaign.plan if campaign is not None else None))
        source = _source(campaign, columns, thumbnails)
        found = shown(output_rows(table, campaign, source, chosen=first.chosen), columns, campaign, adder)
        adder.finish()
    notes += _notes(first, found, adder, campaign)
    told = {
        **_about(output, campaign, found),
        **first.statistics.as_dict(),
        "notes": notes,
        "stages": found.mean_stages(),
        "sample": {"rows": len(found.items), "of": first.statistics.rows},
        "thumbnails": {"shown": adder.shown},
        "columns": columns.others[:MAX_OTHERS],
        "items": found.items,
    }
    write_page(page, _document(told))
    return Written(first.statistics.rows, len(found.items), adder.shown)


@contextmanager
def _campaign(output: str) -> Iterator[Campaign | None]:
    """The campaign beside an output. Raises CampaignError if its file cannot be used."""
    path = state_path(output)
    if not path.exists():
        yield None
        return
    with CampaignState.read(path) as state:
        about = state.about
        yield Campaign(about, Plan.from_dict(about.plan), state)


def _columns(table: Table, campaign: Campaign | None, image: str | None) -> OutputColumns:
    if image is not None and image not in table.columns:
        raise PlanError(f"The output has no column {image!r}.{nearest(image, table.columns)}")
    if campaign is not None:
        return of_plan(campaign.plan, table.columns)
    return guessed(table.columns, map(values_of, itertools.islice(table, 20)), image)


def _source(campaign: Campaign | None, columns: OutputColumns, thumbnails: Thumbnails) -> Table | None:
    """The input's table where only it has the pictures; None if the output has them, or the input is away."""
    if campaign is None or thumbnails is Thumbnails.NONE:
        return None
    path = campaign.about.input
    is_far = is_url(path) and thumbnails is not Thumbnails.FETCH
    if is_far or suffixes(path)[0] in _TEXT_TABLES:
        return None
    try:
        return open_table(path)
    except TableError:
        return None


def _notes(first: Overview, found: Shown, adder: PictureAdder, campaign: Campaign | None) -> list[str]:
    """What its reader must know about the page."""
    notes = []
    rows, shown_rows = first.statistics.rows, len(found.items)
    if shown_rows < rows:
        failed = sum(item["state"] == "failed" for item in found.items)
        notes.append(
            f"Totals and plots are of all {rows:,} rows. Below is a sample of {shown_rows:,}, with {failed:,} of the "
            f"{first.statistics.failed:,} failed ones: their share is greater than it was."
        )
    if adder.left_out:
        notes.append(f"{adder.left_out:,} more rows have pictures: they would make this page too large to open.")
    if campaign is None:
        notes.append("Without the campaign's file beside the output this page has no prompts and no rate over time.")
    return notes


def _about(output: str, campaign: Campaign | None, found: Shown) -> dict[str, Any]:
    name = _name(output)
    told = {"title": name, "output": name, "written": time.time(), "campaign": None, "asked": [], "seconds": None}
    if campaign is None:
        return told
    about, plan = campaign.about, campaign.plan
    models = " · ".join(model for model, _ in found.models.most_common(5))
    asked = [
        ("Task", plan.task),
        ("Picture", plan.image),
        ("Id", plan.id),
        *((field, _setting(value)) for field, value in plan.set.items()),
        *((f"Column {column}", field) for column, field in plan.columns.items()),
        # Not the folders: the page is made to be passed on.
        ("Input", _name(about.input)),
        ("Output", _name(about.output)),
        ("Model", models or None),
        ("Campaign", public_id(about.id)),
    ]
    return {
        **told,
        "title": about.name or name,
        "campaign": {"id": public_id(about.id), "created": about.created},
        "asked": [[label, value] for label, value in asked if value],
        "seconds": about.seconds or None,
    }


def _name(path: str) -> str:
    """A file's own name. Of a URL neither the place nor a signature."""
    plain = path.partition("?")[0] if is_url(path) else path
    return PurePosixPath(plain).name or plain


def _setting(value: str | Sequence[str]) -> str:
    return value if isinstance(value, str) else json.dumps(list(value), ensure_ascii=False)


def _document(told: dict[str, Any]) -> str:
    package = __package__ or ""
    styles = [*map(part, BASE_STYLES), part("page.css", package)]
    scripts = [*map(part, BASE_SCRIPTS), part("gallery.js", package), part("page.js", package)]
    return document(f"{told['title']}: report", part("page.html", package), told, styles, scripts)
