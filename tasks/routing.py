"""The queue of each message: this project's tasks go to its queue, all others as a stock Celery app would send them.

The queue of a named model is found in `tasks/model_directory.py`. The Redis list of a queue's priority is named in
`tasks/redis_keys.py` (`list_name`).
"""

from __future__ import annotations

from bisect import bisect
from typing import Any

from .payloads import PAYLOADS

#: A stock app's default queue, for tasks without a queue.
DEFAULT_QUEUE = "celery"
#: The priorities that a stock worker reads. Our own workers read 0 to 9, so these too.
STOCK_STEPS = (0, 3, 6, 9)


def is_ours(task: Any) -> bool:
    """Whether a message's task is one of this project's."""
    return isinstance(task, str) and task in PAYLOADS


def priority_for(task: Any, priority: Any) -> Any:
    """A message's priority. For another app's task: the next lower step, whose list a stock worker reads."""
    if is_ours(task) or priority is None:
        return priority
    try:
        wanted = max(STOCK_STEPS[0], int(priority))
    except (TypeError, ValueError, OverflowError):
        return STOCK_STEPS[0]
    return STOCK_STEPS[bisect(STOCK_STEPS, wanted) - 1]
