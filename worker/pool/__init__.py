"""InferencePool: Celery's pool for one model process with many jobs in flight."""

from __future__ import annotations

from worker.pool.pool import InferencePool, SoftShutdown, refuse_other_pools

__all__ = ["InferencePool", "SoftShutdown", "refuse_other_pools"]
