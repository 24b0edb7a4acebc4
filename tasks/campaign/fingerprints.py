"""The rows that an earlier output has answers for: what `--only-new` leaves out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..batch_lines import Fingerprints, fingerprint
from .errors import CampaignError
from .plan import Plan
from .tables import BadRow, open_table


def identity(plan: Plan, cells: Mapping[str, Any]) -> int | None:
    """The fingerprint of what identifies a row: its id, or where there is none its image. None without either."""
    name = plan.id or plan.image
    value = cells.get(name) if name else None
    return None if value is None or value == "" else fingerprint(str(value))


def answered_rows(plan: Plan, outputs: Iterable[str]) -> Fingerprints:
    """The identities of rows with an answer without error in some earlier outputs.

    Takes up to 32 bytes for each. Raises CampaignError for an output that cannot be read, or lacks the columns.
    """
    name = plan.id or plan.image
    if name is None:
        raise CampaignError("--only-new needs --id, or --image, to tell the rows by.")
    code = next((column for column, field in plan.columns.items() if field == "error_code"), "error_code")
    found = Fingerprints()
    for path in outputs:
        table = open_table(path)
        for column in (name, code):
            if column not in table.columns:
                raise CampaignError(f"{path} has no column {column!r}: name an output of the same campaign's columns.")
        for row in table:
            if not isinstance(row, BadRow) and not row.get(code) and (known := identity(plan, row)) is not None:
                found.add(known)
    return found
