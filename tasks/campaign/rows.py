"""A campaign's rows: which of them need a job, and what becomes of its outcome. The work of a JobWindow."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..batch_lines import Fingerprints
from ..bulk import JobSender
from ..errors import InvalidRequest, ModelNotFound
from ..outcomes import Outcome
from ..payloads import Job
from ..results import Result
from ..urls import host_of
from .fingerprints import identity
from .plan import Plan
from .progress import Tally
from .state import CampaignState, StoredAnswer, stored
from .tables import BadRow, Table

Cells = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CampaignRow:
    """One row of the input that needs an answer."""

    #: From 1.
    number: int
    #: 8 bytes; changes with what the row asks.
    digest: bytes
    #: Of its image; None without a URL.
    host: str | None
    #: How often --retry-failed has taken it up again.
    retries: int
    #: Whether it has an answer to what it asked earlier.
    has_changed: bool
    plan: Plan
    #: None while its job is in flight.
    cells: Cells | BadRow | None

    def job(self) -> Job:
        """The row's job. Raises a JobError if the row is refused."""
        if isinstance(self.cells, BadRow):
            raise InvalidRequest(self.cells.reason)
        assert self.cells is not None
        self.plan.row_id(self.cells)
        return self.plan.job(self.cells)

    def without_payload(self) -> CampaignRow:
        return replace(self, cells=None)


class CampaignRows:
    """One pass over the input."""

    def __init__(
        self,
        client: Any,
        table: Table,
        plan: Plan,
        state: CampaignState,
        tally: Tally,
        *,
        answered_earlier: Fingerprints | None = None,
        headers: Mapping[str, str] | None = None,
        on_note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`answered_earlier`: identities of rows that are left out. `headers`: of each job's message."""
        self._client = client
        self._table = table
        self._plan = plan
        self._columns = plan.needed_columns
        self._state = state
        self._tally = tally
        self._earlier = answered_earlier
        self._headers = dict(headers or {})
        self._note = on_note
        about = state.about
        self._campaign = about.id
        self._sent_before = about.sent
        self._sent = about.sent
        self._dropped: list[int] = []
        self._left_out: list[int] = []
        self._has_told = False
        #: Tokens of all answers.
        self.tokens = about.tokens
        #: Rows of the input; None until it is read to its end.
        self.rows: int | None = None
        #: Rows that --only-new has left out so far.
        self.left_out = state.left_out_count()

    # What a JobWindow asks

    def items(self) -> Iterator[CampaignRow | None]:
        number = 0
        answered = InOrder((row, rest) for row, *rest in self._state.digests())
        left_out = InOrder((row, True) for row in self._state.left_out())
        retries = InOrder(self._state.retries())
        for number, cells in enumerate(self._table, 1):
            known, times = answered.at(number), retries.at(number) or 0
            yield None if left_out.at(number) else self._row(number, cells, known, times)
        self.rows = number

    def job_id(self, row: CampaignRow) -> str:
        named = f"{self._campaign} {row.number} {row.retries} ".encode() + row.digest
        return str(uuid.UUID(bytes=hashlib.blake2b(named, digest_size=16).digest()))

    def was_sent(self, row: CampaignRow) -> bool:
        return row.number <= self._sent_before and not row.has_changed

    def submit(self, sender: JobSender, row: CampaignRow, job: Job, priority: int, id: str) -> None:
        sender.submit(job, priority=priority, task_id=id, headers=self._headers)

    def note_sent(self, row: CampaignRow) -> None:
        self._sent = max(self._sent, row.number)

    def answer(self, row: CampaignRow, outcome: Outcome | ModelNotFound, id: str) -> StoredAnswer:
        if isinstance(outcome, ModelNotFound):
            # The client's own model: no row could be sent.
            raise outcome
        if isinstance(outcome, Result):
            self.tokens += outcome.usage.prompt_tokens + outcome.usage.completion_tokens
        return stored(row.number, row.digest, id, row.host, outcome, time.time())

    def queued(self, rows: Iterable[CampaignRow], priority: int) -> int:
        return int(self._client.queued(priority))

    # The turn's end

    def save(self, answers: list[StoredAnswer], seconds: float) -> None:
        """Commit a turn's answers, and how far the pass is. After that their results may be deleted.

        `seconds`: those of all runs.
        """
        with self._state.transaction():
            self._state.drop(self._dropped)
            self._state.leave_out(self._left_out)
            self._state.store(answers)
            self._state.update(sent=self._sent, tokens=self.tokens, seconds=round(seconds, 3))
        self._dropped, self._left_out = [], []
        for answer in answers:
            self._tally.add(answer.code, answer.host)

    # Single rows

    def _row(self, number: int, cells: Cells | BadRow, known: list[Any] | None, retries: int) -> CampaignRow | None:
        digest = row_digest(self._columns, cells)
        if known is not None and known[0] == digest:
            return None
        if known is None and self._is_left_out(cells):
            self._left_out.append(number)
            self.left_out += 1
            return None
        if known is not None:
            self._take_back(number, *known[1:])
        return CampaignRow(number, digest, self._host(cells), retries, known is not None, self._plan, cells)

    def _take_back(self, number: int, code: str | None, host: str | None) -> None:
        self._dropped.append(number)
        self._tally.add(code, host, -1)
        if not self._has_told:
            self._has_told = True
            self._note(f"The input has changed: row {number:,} asks something else now. Such rows are sent anew.")

    def _is_left_out(self, cells: Cells | BadRow) -> bool:
        if self._earlier is None or isinstance(cells, BadRow):
            return False
        name = identity(self._plan, cells)
        return name is not None and name in self._earlier

    def _host(self, cells: Cells | BadRow) -> str | None:
        if isinstance(cells, BadRow):
            return None
        values = (cells.get(name) for name in ([self._plan.image] if self._plan.image else self._columns))
        return next((host for value in values if isinstance(value, str) and (host := host_of(value.strip()))), None)


def row_digest(columns: Sequence[str], cells: Cells | BadRow) -> bytes:
    """8 bytes that change with what a row asks: with its cells in the columns that the plan reads."""
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(cells, BadRow):
        digest.update(b"unreadable")
        return digest.digest()
    for name in columns:
        value = cells.get(name)
        digest.update(value if isinstance(value, bytes) else repr(value).encode(errors="surrogatepass"))
        digest.update(b"\0")
    return digest.digest()


class InOrder:
    """Values by row, read along with the rows."""

    def __init__(self, values: Iterable[tuple[int, Any]]) -> None:
        """`values`: in the rows' order."""
        self._values = iter(values)
        self._next: tuple[int, Any] | None = (0, None)

    def at(self, row: int) -> Any:
        """The value of a row, or None. Rows must be asked for in order."""
        while self._next is not None and self._next[0] < row:
            self._next = next(self._values, None)
        return self._next[1] if self._next is not None and self._next[0] == row else None
