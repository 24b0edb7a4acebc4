"""The number of rows that fit on the device at once, learnt from batches that ran out of memory or did not. Pure.

`Engine._recover` (`engine.py`) runs a batch that ran out of memory again, in halves.
"""

from __future__ import annotations

#: Batches at the limit that must succeed before it is raised: the first number, and the largest. The number doubles
#: each time that memory is short, so that a device without room for more fails less and less often.
FIRST_PROOF, LONGEST_PROOF = 4, 64


class Ceiling:
    """A limit of rows: lowered when a batch runs out of memory, raised again after batches of that size succeed.

    Memory is often short for a passing reason, such as another program on the device or one very long row. A row with
    four beams counts four.
    """

    def __init__(self, max_rows: int) -> None:
        """`max_rows`: the configured maximum, which holds until memory is short."""
        self._max_rows = max_rows
        self._proof = FIRST_PROOF
        self._proved = 0
        self.rows = max_rows

    def lower(self, failed: int) -> None:
        """Record that a batch of `failed` rows ran out of memory: half of them may fit."""
        self.rows = max(1, min(self.rows, failed // 2))
        self._proved = 0
        self._proof = min(2 * self._proof, LONGEST_PROOF)

    def restore(self, rows: int) -> None:
        """Set the limit back to `rows`. For a row that did not fit alone: others may still fit."""
        self.rows = rows
        self._proved = 0

    def ran_well(self, rows: int) -> None:
        """Record that a batch of `rows` rows had enough memory. A batch below the limit proves nothing."""
        if self.rows == self._max_rows or rows < self.rows:
            return
        self._proved += 1
        if self._proved >= self._proof:
            self.rows = min(self._max_rows, 2 * self.rows)
            self._proved = 0
