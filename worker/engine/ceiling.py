"""How many rows fit on the device at once, learnt from batches that ran out of memory or did not: a pure count."""

from __future__ import annotations

#: Batches at the ceiling that must end well before it is raised, at first and at most. The number doubles each time
#: that memory was short, so that a device without room for more pays for failed tries ever more rarely.
FIRST_PROOF, LONGEST_PROOF = 4, 64


class Ceiling:
    """A limit of rows: lowered when a batch runs out of memory, raised again as batches of that size end well.

    Memory is often short for a passing reason: another program on the device, or one unusually long row. Rows are
    counted in beams: one with four beams counts four.
    """

    def __init__(self, most: int) -> None:
        """`most`: the configured maximum, which holds until memory is short."""
        self._most = most
        self._proof = FIRST_PROOF
        self._proved = 0
        self.rows = most

    def lower(self, failed: int) -> None:
        """Record that a batch of `failed` rows ran out of memory: half of them may fit."""
        self.rows = max(1, min(self.rows, failed // 2))
        self._proved = 0
        self._proof = min(2 * self._proof, LONGEST_PROOF)

    def restore(self, rows: int) -> None:
        """Set the limit back to `rows`: the row that was too large did not fit alone, so its failures say nothing of
        others."""
        self.rows = rows
        self._proved = 0

    def ran_well(self, rows: int) -> None:
        """Record that a batch of `rows` rows had enough memory. A batch below the limit proves nothing."""
        if self.rows == self._most or rows < self.rows:
            return
        self._proved += 1
        if self._proved >= self._proof:
            self.rows = min(self._most, 2 * self.rows)
            self._proved = 0
