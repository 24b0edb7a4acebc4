"""How many rows fit on the device at once, as far as experience tells: a pure count."""

from __future__ import annotations

#: Batches at the ceiling that have to end well before it is raised. The number doubles each time that memory was
#: short: a device that never has room for more pays for a failed try more and more seldom.
FIRST_PROOF, LONGEST_PROOF = 4, 64


class Ceiling:
    """Lowered where a batch ran out of memory, raised again as batches of that size end well.

    Memory is often short for a passing reason: another program on the device, or one unusually long row. Rows are
    counted in beams, as everywhere: one with four beams counts four.
    """

    def __init__(self, most: int) -> None:
        """`most`: the setting's maximum, which holds until memory is short."""
        self._most = most
        self._proof = FIRST_PROOF
        self._proved = 0
        self.rows = most

    def lower(self, failed: int) -> None:
        """A batch of `failed` rows ran out of memory: half of them may fit."""
        self.rows = max(1, min(self.rows, failed // 2))
        self._proved = 0
        self._proof = min(2 * self._proof, LONGEST_PROOF)

    def restore(self, rows: int) -> None:
        """The row that was too large did not fit alone either, so its failures say nothing of others."""
        self.rows = rows
        self._proved = 0

    def ran_well(self, rows: int) -> None:
        """A batch of so many rows had memory enough. One below the ceiling proves nothing."""
        if self.rows == self._most or rows < self.rows:
            return
        self._proved += 1
        if self._proved >= self._proof:
            self.rows = min(self._most, 2 * self.rows)
            self._proved = 0
