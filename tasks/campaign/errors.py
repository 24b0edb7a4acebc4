"""The errors of campaigns."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from ..errors import IdeficsError


class CampaignError(IdeficsError, ValueError):
    """The campaign cannot be run as asked: correct what the message names."""

    code = "campaign"
    http_status = 422
    public = {"": "This cannot be run as it is asked for: tell the service's operator."}


class PlanError(CampaignError):
    """The campaign's options do not fit its input: correct the one that the message names."""

    code = "plan"


class TableError(CampaignError):
    """The table cannot be read or written: correct what the message names."""

    code = "table"


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence with the known names most like `name`, or else with the first 20. Empty if no name is known."""
    names = list(known)
    by_folded = {one.casefold().strip(): one for one in names}
    close = difflib.get_close_matches(name.casefold().strip(), by_folded, n=3)
    if close:
        return f" Did you mean {' or '.join(repr(by_folded[one]) for one in close)}?"
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f" Known: {', '.join(map(repr, names[:20]))}{more}." if names else ""
