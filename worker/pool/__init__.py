"""InferencePool: Celery's pool for one model process with many jobs in flight."""

from __future__ import annotations

from worker.pool.pool import InferencePool, SoftShutdown

__all__ = ["InferencePool", "SoftShutdown"]
