"""A campaign's record in Redis: what everybody may see of it. It holds no rows, addresses, paths or ids of jobs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from ..steering import Wanted

#: Seconds that a record is kept after its producer's last report.
TTL_S = 7 * 86_400
#: Seconds without a report after which a producer counts as gone.
SILENT_S = 30.0
#: Records kept, the newest.
MAX_CAMPAIGNS = 1_000
#: Characters of a name, and error codes counted apart.
MAX_CHARS, MAX_CODES = 200, 50
#: A larger number is none of a campaign's: no count, and no time of this millennium.
MAX_NUMBER = 1e11

#: How a producer ended: all rows have an answer; it was interrupted or reached a limit, and can go on; it was canceled.
Ended = Literal["", "finished", "stopped", "canceled"]
Status = Literal["running", "paused", "canceled", "finished", "stopped", "silent"]


def public_id(id: str) -> str:
    """The id under which others see a campaign: a digest of its own id, from which the ids of its jobs are made."""
    return hashlib.blake2b(id.encode(), digest_size=6).hexdigest()


def base_name(path: str) -> str:
    """The last part of a path or URL, without a query or credentials."""
    parts = urlsplit(path) if "://" in path else None
    last = (parts.path if parts else path.replace("\\", "/")).rstrip("/").rpartition("/")[2]
    return (last or (parts.hostname if parts else None) or "")[:MAX_CHARS]


@dataclass(frozen=True, slots=True)
class CampaignInfo:
    """What does not change while a campaign runs."""

    name: str
    #: As `idefics.caption`.
    task: str
    #: Base names.
    input: str
    output: str
    #: The producer's machine.
    host: str
    #: Unix seconds of its first start.
    started: float = 0.0


@dataclass(frozen=True, slots=True)
class CampaignProgress:
    """How far a campaign is."""

    #: Rows of the input; None while it is not known.
    rows: int | None = None
    #: Rows that have an answer or an error.
    done: int = 0
    #: Rows that have an error, and these by code.
    failed: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    in_flight: int = 0
    #: Rows a second, of late.
    rate: float = 0.0
    #: What limits the rate, in words; empty if it is not known.
    bound: str = ""
    #: Estimated seconds to the end; None if they are not known.
    left_s: float | None = None


@dataclass(frozen=True, slots=True)
class CampaignRecord:
    """A campaign as others see it."""

    id: str
    info: CampaignInfo
    progress: CampaignProgress
    wanted: Wanted
    #: Unix seconds of the producer's last report, by the server's clock.
    seen: float
    ended: Ended = ""
    #: Seconds since that report.
    age_s: float = 0.0

    @property
    def status(self) -> Status:
        """What users want precedes silence: jobs in flight are held back without their producer, too."""
        if self.ended:
            return self.ended
        if self.wanted.state != "running":
            return self.wanted.state
        return "silent" if self.age_s > SILENT_S else "running"

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "id": self.id,
            "status": self.status,
            **asdict(self.info),
            **asdict(self.progress),
            "seen": self.seen,
            "age_s": round(self.age_s, 1),
        }


def about_mapping(info: CampaignInfo) -> dict[str, str | float]:
    """The fields of the hash that do not change."""
    return {name: _bounded(value) for name, value in asdict(info).items()}


def progress_mapping(progress: CampaignProgress) -> dict[str, str | float]:
    """The fields of the hash that each report writes."""
    values = {name: "" if value is None else _bounded(value) for name, value in asdict(progress).items()}
    most = sorted(progress.failures.items(), key=lambda each: -each[1])[:MAX_CODES]
    return {**values, "failures": json.dumps(dict(most))}


def record(id: str, found: Mapping[bytes, bytes], wanted: Wanted, now: float) -> CampaignRecord:
    """A campaign's record from its hash. Fields that are missing or of another form have their defaults."""
    texts = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in found.items()}
    info = CampaignInfo(
        **{name: texts.get(name, "") for name in ("name", "task", "input", "output", "host")},
        started=_number(texts.get("started")) or 0.0,
    )
    rows, left_s = _number(texts.get("rows")), _number(texts.get("left_s"))
    progress = CampaignProgress(
        rows=None if rows is None else int(rows),
        left_s=left_s,
        failures=_counts(texts.get("failures")),
        rate=_number(texts.get("rate")) or 0.0,
        bound=texts.get("bound", ""),
        **{name: int(_number(texts.get(name)) or 0) for name in ("done", "failed", "in_flight")},
    )
    seen, ended = _number(texts.get("seen")) or 0.0, texts.get("ended", "")
    return CampaignRecord(id, info, progress, wanted, seen, _ENDS.get(ended, ""), max(0.0, now - seen))


_ENDS: dict[str, Ended] = {"finished": "finished", "stopped": "stopped", "canceled": "canceled"}


def _bounded(value: Any) -> str | float:
    return value if isinstance(value, int | float) else str(value)[:MAX_CHARS]


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if 0 <= number <= MAX_NUMBER else None


def _counts(text: str | None) -> dict[str, int]:
    try:
        found = json.loads(text or "{}")
        return {str(code): int(count) for code, count in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}
