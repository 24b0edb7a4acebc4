"""Counts an input's rows in the background, for the time that is left, where the table does not know them."""

from __future__ import annotations

import threading

from .errors import CampaignError
from .tables import Table


class RowCount:
    """The number of an input's rows."""

    def __init__(self, table: Table, path: str) -> None:
        """`path`: the table's, which is read a second time if its rows must be counted."""
        #: None while they are counted.
        self.rows: int | None = table.count
        if self.rows is None and "://" not in path:
            # Not a URL's: it would be downloaded twice.
            threading.Thread(target=self._run, args=[table], daemon=True, name="row-count").start()

    def _run(self, table: Table) -> None:
        try:
            self.rows = sum(1 for _ in table)
        except CampaignError:
            # The run itself reads the input, and says what is wrong with it.
            return
