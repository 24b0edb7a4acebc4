"""A campaign's state: one SQLite file beside the output, `OUTPUT.campaign`.

A row's answer is committed here before its result is deleted from Redis, so that after any interruption exactly the
rows without an answer are left. The file stays after the end: failed rows are queried and run again by it, and reports
are made from it. Other processes may read it while a campaign runs.

SQLite and not Redis: the state of ten million rows belongs on the producer's disk rather than in the workers' memory,
it must not expire, and failures can be queried with SQL. SQLite's write-ahead log needs a local disk.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from ..errors import ERRORS, Internal, JobCanceled, JobError
from ..outcomes import Outcome
from ..results import Result
from .errors import CampaignError

#: In the file's header, so that another program's SQLite file is not taken for a campaign's: "idfc".
APPLICATION_ID = 0x69646663
#: The tables' form.
VERSION = 1
#: Answers that are read at once. No read transaction lasts longer: one would keep the log from being cut.
CHUNK = 5_000
#: Seconds that a reader or writer waits for another one.
BUSY_S = 30.0
#: Hosts that failures are counted by.
MAX_HOSTS = 1_000

_TABLES = """
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE answers (
    row INTEGER PRIMARY KEY,
    digest BLOB NOT NULL,
    job TEXT NOT NULL,
    code TEXT,
    host TEXT,
    answer TEXT NOT NULL,
    ended REAL NOT NULL
);
CREATE INDEX failures ON answers (code, host) WHERE code IS NOT NULL;
-- Rows that --only-new leaves out.
CREATE TABLE left_out (row INTEGER PRIMARY KEY);
-- How often --retry-failed has taken a row up again: part of its job's id.
CREATE TABLE retries (row INTEGER PRIMARY KEY, times INTEGER NOT NULL);
"""
# Failed rows with some codes, or all where :codes is an empty list.
_FAILURES = """
SELECT * FROM answers
WHERE code IS NOT NULL AND (:codes = '[]' OR code IN (SELECT value FROM json_each(:codes)))
ORDER BY row LIMIT :limit
"""
_COUNT_RETRIES = """
INSERT INTO retries SELECT row, 1 FROM answers
WHERE code IS NOT NULL AND (:codes = '[]' OR code IN (SELECT value FROM json_each(:codes)))
ON CONFLICT (row) DO UPDATE SET times = times + 1
"""
_DROP_FAILURES = """
DELETE FROM answers
WHERE code IS NOT NULL AND (:codes = '[]' OR code IN (SELECT value FROM json_each(:codes)))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a campaign is, and how far it is."""

    #: 32 hexadecimal digits; its jobs' ids are made from it.
    id: str
    name: str
    #: Plan.as_dict().
    plan: dict[str, Any]
    input: str
    output: str
    #: Earlier outputs whose answered rows are left out.
    only_new: list[str] = field(default_factory=list)
    #: Unix seconds.
    created: float
    #: The jobs of rows 1 to `sent` were sent.
    sent: int = 0
    #: Rows of the input; None until it was read to its end.
    rows: int | None = None
    #: Seconds that its runs have lasted so far.
    seconds: float = 0.0
    #: Tokens of its answers so far, those of prompts too.
    tokens: int = 0
    #: The input's size and time when it was read to its end with all rows answered; None before.
    finished: str | None = None
    #: The codes of `--retry-failed` whose rows have not all run again; None otherwise. Empty: all codes.
    retrying: list[str] | None = None
    #: Whether its last run ended because it was canceled.
    canceled: bool = False


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """A row's answer."""

    #: From 1.
    row: int
    #: 8 bytes; changes with what the row asks.
    digest: bytes
    #: The job's id. A row that was refused without sending has one too.
    job: str
    #: The error's code; None if the job succeeded.
    code: str | None
    #: Of the row's image; None without a URL.
    host: str | None
    #: JSON of the Result, or of the error: code, message, detail.
    answer: str
    #: Unix seconds.
    ended: float

    @property
    def outcome(self) -> Outcome:
        """The Result, or the error."""
        if self.code is None:
            return Result.model_validate_json(self.answer)
        error = json.loads(self.answer)
        return _error(self.code, error["message"], error.get("detail"))


def stored(row: int, digest: bytes, job: str, host: str | None, outcome: Outcome, ended: float) -> StoredAnswer:
    """An outcome as it is stored."""
    if isinstance(outcome, Result):
        # Fields with their default values would double the file.
        return StoredAnswer(row, digest, job, None, host, outcome.model_dump_json(exclude_defaults=True), ended)
    # Text from a stranger's file may hold half a character, which is no UTF-8: JSON escapes it.
    return StoredAnswer(row, digest, job, outcome.code, host, json.dumps(outcome.as_dict()), ended)


def _error(code: str, message: str, detail: str | None) -> JobError | JobCanceled:
    if code == JobCanceled.code:
        return JobCanceled(message)
    return ERRORS.get(code, Internal)(message, detail=detail)


@dataclass(frozen=True, slots=True)
class Counts:
    """Answered rows."""

    done: int
    #: Failed ones by error code, and by the host of their image, the most frequent first; MAX_HOSTS of these at most.
    by_code: dict[str, int]
    by_host: dict[str, int]

    @property
    def failed(self) -> int:
        return sum(self.by_code.values())


def state_path(output: str) -> Path:
    """Where the state of a campaign with this output is: beside it, or in the current folder for a URL."""
    if "://" in output:
        return Path(f"{output.split('?')[0].rstrip('/').rpartition('/')[2]}.campaign")
    path = Path(output)
    return path.with_name(f"{path.name}.campaign")


class CampaignState:
    """An open state file. Used by one thread at a time.

    Opening raises CampaignError where the file is missing or not a campaign's; all calls sqlite3.Error where the disk
    fails.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        """For `begin` and `read`."""
        self._sql = connection
        self.path = path

    @classmethod
    def begin(cls, path: Path, about: About) -> Self:
        """The file to write to; made with `about` where there is none yet."""
        state = cls(_checked(_connected(path, "rwc"), path, may_be_empty=True), path)
        state._sql.execute("PRAGMA journal_mode = WAL")
        # Enough against a killed process. After a power failure the last rows may run again.
        state._sql.execute("PRAGMA synchronous = NORMAL")
        with state.transaction():
            if _is_empty(state._sql):
                _make_tables(state._sql)
                state.update(**{each.name: getattr(about, each.name) for each in fields(About)})
        return state

    @classmethod
    def read(cls, path: Path) -> Self:
        """An existing file, for reading only."""
        return cls(_checked(_connected(path, "ro"), path), path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._sql.close()

    # What the campaign is

    @property
    def about(self) -> About:
        known = {each.name for each in fields(About)}
        found = self._sql.execute("SELECT key, value FROM about")
        return About(**{key: json.loads(value) for key, value in found if key in known})

    def update(self, **values: Any) -> None:
        """Change fields of `about`."""
        self._sql.executemany(
            "INSERT OR REPLACE INTO about VALUES (?, ?)", [(key, json.dumps(value)) for key, value in values.items()]
        )

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes within the block are committed together, or none."""
        self._sql.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._sql.execute("ROLLBACK")
            raise
        self._sql.execute("COMMIT")

    # Answers

    def store(self, answers: Iterable[StoredAnswer]) -> None:
        """Add or replace rows' answers."""
        rows = [(a.row, a.digest, a.job, a.code, a.host, a.answer, a.ended) for a in answers]
        self._sql.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def drop(self, rows: Iterable[int]) -> None:
        """Delete rows' answers."""
        self._sql.executemany("DELETE FROM answers WHERE row = ?", [(row,) for row in rows])

    def leave_out(self, rows: Iterable[int]) -> None:
        """Note rows that are neither run nor written."""
        self._sql.executemany("INSERT OR IGNORE INTO left_out VALUES (?)", [(row,) for row in rows])

    def cut(self, rows: int) -> None:
        """Delete all about rows after the first `rows`: the input has become shorter."""
        self._sql.execute("DELETE FROM answers WHERE row > ?", (rows,))
        self._sql.execute("DELETE FROM left_out WHERE row > ?", (rows,))
        self._sql.execute("DELETE FROM retries WHERE row > ?", (rows,))

    def answers(self) -> Iterator[StoredAnswer]:
        """All answers in the rows' order. Memory stays flat; answers that are stored meanwhile may be among them."""
        found = self._chunks("SELECT * FROM answers WHERE row > ? ORDER BY row LIMIT ?")
        return (StoredAnswer(*each) for each in found)

    def answers_of(self, rows: Collection[int]) -> Iterator[StoredAnswer]:
        """The answers of some rows, in the rows' order."""
        for row in sorted(rows):
            found = self._sql.execute("SELECT * FROM answers WHERE row = ?", (row,)).fetchone()
            if found:
                yield StoredAnswer(*found)

    def digests(self) -> Iterator[tuple[int, bytes, str | None, str | None]]:
        """The row, digest, code and host of each answer, in the rows' order."""
        return self._chunks("SELECT row, digest, code, host FROM answers WHERE row > ? ORDER BY row LIMIT ?")

    def left_out(self) -> Iterator[int]:
        """The rows that are left out, in order."""
        return (row for (row,) in self._chunks("SELECT row FROM left_out WHERE row > ? ORDER BY row LIMIT ?"))

    def retries(self) -> Iterator[tuple[int, int]]:
        """The rows that were taken up again, in order, and how often."""
        return self._chunks("SELECT row, times FROM retries WHERE row > ? ORDER BY row LIMIT ?")

    def _chunks(self, query: str) -> Iterator[Any]:
        last = 0
        while found := self._sql.execute(query, (last, CHUNK)).fetchall():
            yield from found
            last = found[-1][0]

    def counts(self) -> Counts:
        """The number of answers, and of failed ones by code and host."""
        done = self._sql.execute("SELECT count(*) FROM answers").fetchone()[0]
        by_code = self._sql.execute(
            "SELECT code, count(*) FROM answers WHERE code IS NOT NULL GROUP BY code ORDER BY 2 DESC"
        )
        by_host = self._sql.execute(
            "SELECT host, count(*) FROM answers WHERE code IS NOT NULL AND host IS NOT NULL "
            "GROUP BY host ORDER BY 2 DESC LIMIT ?",
            (MAX_HOSTS,),
        )
        return Counts(done, dict(by_code), dict(by_host))

    def left_out_count(self) -> int:
        return int(self._sql.execute("SELECT count(*) FROM left_out").fetchone()[0])

    def failures(self, codes: Sequence[str] = (), limit: int = -1) -> Iterator[StoredAnswer]:
        """Failed rows' answers in the rows' order, with some codes or all; at most `limit` where it is not negative."""
        found = self._sql.execute(_FAILURES, {"codes": json.dumps(list(codes)), "limit": limit})
        return (StoredAnswer(*each) for each in found)

    def retry(self, codes: Sequence[str] = ()) -> int:
        """Delete the answers of failed rows with some codes or all, so that they run again. Returns how many."""
        chosen = {"codes": json.dumps(list(codes))}
        with self.transaction():
            self._sql.execute(_COUNT_RETRIES, chosen)
            deleted = self._sql.execute(_DROP_FAILURES, chosen)
            if deleted.rowcount:
                self.update(sent=0, finished=None, retrying=list(codes))
        return deleted.rowcount


def _connected(path: Path, mode: str) -> sqlite3.Connection:
    try:
        # isolation_level None: transactions begin and end where this module says so.
        return sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=BUSY_S, isolation_level=None
        )
    except sqlite3.OperationalError as error:
        raise CampaignError(f"Cannot open {path}: {error}.") from None


def _is_empty(connection: sqlite3.Connection) -> bool:
    return not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]


def _make_tables(connection: sqlite3.Connection) -> None:
    for statement in _TABLES.split(";"):
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {VERSION}")


def _checked(connection: sqlite3.Connection, path: Path, *, may_be_empty: bool = False) -> sqlite3.Connection:
    try:
        made_by, version = _pragma(connection, "application_id"), _pragma(connection, "user_version")
        is_ours = (made_by, version) == (APPLICATION_ID, VERSION) or (may_be_empty and _is_empty(connection))
    except sqlite3.DatabaseError:
        made_by, is_ours = 0, False
    if is_ours:
        return connection
    connection.close()
    if made_by == APPLICATION_ID:
        raise CampaignError(f"{path} was made by another version of idefics-jobs: use that one, or another output.")
    raise _foreign(path)


def _foreign(path: Path) -> CampaignError:
    return CampaignError(f"{path} is not a campaign's state: move it away, or name another output.")


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])
