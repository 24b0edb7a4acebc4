"""What a worker registers about its work, for `idefics-jobs top`: few numbers, renewed with its registration.

Rates and failures are those of the last seconds or minutes, computed by the worker itself, so that one reading shows
them. Lasting counters are the worker's metrics (`worker/observability/metrics.py`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

#: Seconds over which a worker's rates and failures are counted.
RATES_S, FAILURES_S = 30.0, 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """A worker's settings that bound how fast images are downloaded; by default those of a worker without any."""

    #: Simultaneous downloads from one host, and from all hosts.
    host_concurrency: int = 8
    #: From one host by all workers together; 0: no limit.
    host_shared: int = 32
    image_jobs: int = 64
    #: Seconds for one download.
    image_timeout_s: float = 20.0
    #: Retries after a temporary error, and the seconds before the first one.
    max_retries: int = 3
    retry_backoff_s: float = 2.0

    @staticmethod
    def read(said: dict[str, Any]) -> WorkerLimits:
        """Without the fields that a newer worker has added."""
        return WorkerLimits(**{each.name: said[each.name] for each in fields(WorkerLimits) if each.name in said})


DEFAULT_LIMITS = WorkerLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """A worker's state and recent work."""

    #: `ready`, `busy` (all its places are taken) or another one of worker/health.py.
    state: str = "unknown"
    #: Its IDEFICS_MODEL.
    model: str = ""
    #: Jobs that it has taken and that have not ended.
    jobs: int = 0
    #: Those of them that wait for a slot of their image's host.
    waiting_for_host: int = 0
    #: Rows in the batch, and how many it may have.
    rows: int = 0
    max_rows: int = 0
    #: Jobs that ended here and new tokens, a second over the last RATES_S.
    jobs_per_s: float = 0.0
    tokens_per_s: float = 0.0
    #: Failed jobs of the last FAILURES_S, by error code.
    failures: dict[str, int] = field(default_factory=dict)
    limits: WorkerLimits = DEFAULT_LIMITS

    def written(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def read(text: bytes | str) -> WorkerStatus:
        """Without the fields that a newer worker has added."""
        said: dict[str, Any] = json.loads(text)
        said["limits"] = WorkerLimits.read(said.get("limits", {}))
        return WorkerStatus(**{each.name: said[each.name] for each in fields(WorkerStatus) if each.name in said})
