"""InferencePool: Celery's pool for one model process with many jobs in flight.

`pool.py` is Celery's interface, `dispatcher.py` decides which job may run, `supervisor.py` restarts the model process,
`quarantine.py` plans what runs again after it died, `time_limits.py` ends jobs that run too long, `request.py` stores
outcomes and acknowledges, `bootsteps.py` has the soft shutdown.
"""

from __future__ import annotations

from worker.pool.bootsteps import PoolExitInTime, SoftShutdown, refuse_other_pools
from worker.pool.pool import InferencePool

__all__ = ["InferencePool", "PoolExitInTime", "SoftShutdown", "refuse_other_pools"]
