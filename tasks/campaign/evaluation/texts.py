"""How good texts are: the share that matches an accepted truth, exactly and normalised."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from .intervals import SEED, Estimate, share
from .matching import Match
from .rows import JudgedRow


@dataclass(slots=True)
class TextTally:
    """Rows counted by how they match."""

    matches: Counter[Match] = field(default_factory=Counter)

    def add(self, row: JudgedRow) -> None:
        self.matches[row.match] += 1


@dataclass(frozen=True, slots=True)
class TextFigures:
    """The numbers of a table of texts. In `exact` and `normalised` a row without an answer is wrong."""

    rows: int
    unanswered: int
    exact: Estimate
    #: Over the rows with an answer.
    exact_answered: Estimate
    normalised: Estimate
    normalised_answered: Estimate

    def as_dict(self) -> dict[str, Any]:
        return {"kind": "text", **asdict(self)}


def text_figures(tally: TextTally, seed: int = SEED) -> TextFigures:
    """The numbers of the rows that were counted."""
    rows = tally.matches.total()
    answered = sum(count for match, count in tally.matches.items() if match.is_answered)
    exact = sum(count for match, count in tally.matches.items() if match.is_exact)
    normalised = sum(count for match, count in tally.matches.items() if match.is_normalised)
    return TextFigures(
        rows=rows,
        unanswered=rows - answered,
        exact=share(exact, rows, seed),
        exact_answered=share(exact, answered, seed),
        normalised=share(normalised, rows, seed),
        normalised_answered=share(normalised, answered, seed),
    )
