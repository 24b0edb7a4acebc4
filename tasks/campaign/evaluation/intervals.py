"""Estimates with 95 % intervals, by the bootstrap: how far a number may be off because the rows are a sample.

Rows are counted by kind (a "cell", such as one pair of truth and answer). To draw n rows with replacement is to draw
the cells' counts from a multinomial distribution, so that a resample costs no more for a million rows than for ten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Counts = NDArray[np.int64]
    Values = NDArray[np.float64]
    #: From counts, shaped (resamples, cells), to the number of each resample; NaN where it is not defined.
    Statistic = Callable[[Counts], Values]

RESAMPLES = 2_000
SEED = 20
LEVEL = 0.95
#: Counts held at once: 32 MB.
_AT_ONCE = 4_000_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval."""

    #: None without rows.
    value: float | None
    #: None where there is no interval: all resamples give the same number, which says nothing about other rows.
    low: float | None
    high: float | None
    #: Rows that it is computed from.
    rows: int
    #: `exact` (Clopper and Pearson): for a share of 0 or 1, whose resamples are all alike.
    method: Literal["bootstrap", "exact", "none"]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def share(right: int, rows: int, seed: int = SEED) -> Estimate:
    """The share of `right` among `rows`, 0 to 1."""
    import numpy as np

    if rows == 0:
        return Estimate(None, None, None, 0, "none")
    if 0 < right < rows:
        return estimate(np.array([right, rows - right]), lambda counts: counts[:, 0] / rows, seed)
    # The two-sided interval's closed form at its ends.
    edge = ((1 - LEVEL) / 2) ** (1 / rows)
    low, high = (edge, 1.0) if right else (0.0, 1 - edge)
    return Estimate(right / rows, low, high, rows, "exact")


def estimate(cells: Counts, statistic: Statistic, seed: int = SEED) -> Estimate:
    """A number of the cells' counts, with the percentile bootstrap's interval."""
    import numpy as np

    rows = int(cells.sum())
    if rows == 0:
        return Estimate(None, None, None, 0, "none")
    value = float(statistic(cells[None, :])[0])
    values = np.concatenate([statistic(drawn) for drawn in _resamples(cells, seed)])
    tail = (1 - LEVEL) / 2
    low, high = (float(each) for each in np.nanquantile(values, (tail, 1 - tail)))
    if not high - low > 1e-12:
        return Estimate(value, None, None, rows, "none")
    return Estimate(value, low, high, rows, "bootstrap")


def _resamples(cells: Counts, seed: int) -> Iterator[Counts]:
    """All resamples' counts, in parts shaped (resamples, cells)."""
    import numpy as np

    random = np.random.default_rng(seed)
    rows = cells.sum()
    step = max(1, min(RESAMPLES, _AT_ONCE // len(cells)))
    for start in range(0, RESAMPLES, step):
        yield random.multinomial(rows, cells / rows, size=min(step, RESAMPLES - start))
