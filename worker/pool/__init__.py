"""InferencePool: Celery's pool for one model process with many jobs in flight."""

from __future__ import annotations

from worker.pool.bootsteps import PoolExitInTime, SoftShutdown, refuse_other_pools
from worker.pool.pool import InferencePool

__all__ = ["InferencePool", "PoolExitInTime", "SoftShutdown", "refuse_other_pools"]
