"""Groups in which jobs run again after the model process died: a pure plan.

One of the jobs in flight may have killed it. They run again in groups of about the square root of their number; eight
or fewer run one by one. So few deaths find the culprit, and the other jobs succeed. (With one culprit among 64 jobs it
takes 4 deaths. Halving would take 6, and running all of them one by one would stop batching.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

#: Up to this many suspects run one by one.
ALONE = 8
#: Deaths of the process while only this job runs, after which the job fails.
MAX_DEATHS_ALONE = 2


def groups(suspects: Sequence[T]) -> list[list[T]]:
    """Divide the suspects into groups that run one after the other."""
    size = 1 if len(suspects) <= ALONE else math.ceil(math.sqrt(len(suspects)))
    return [list(suspects[start : start + size]) for start in range(0, len(suspects), size)]
