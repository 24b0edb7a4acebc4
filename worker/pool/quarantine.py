"""Groups in which jobs run again after the model process died: a pure plan.

One of the jobs in flight may have killed it. They run again in groups of about the square root of their number; eight
or fewer run one by one. Few deaths find the culprit, and the other jobs succeed. (64 in flight of which one kills: 4
deaths. Halving would take 6, and running all one by one would give up batching for the whole queue.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

#: Up to this many suspects run one by one.
ALONE = 8
#: Deaths of the process with only this job in it, after which the job fails.
MAX_DEATHS_ALONE = 2


def groups(suspects: Sequence[T]) -> list[list[T]]:
    """Divide the suspects into groups that run one after the other."""
    size = 1 if len(suspects) <= ALONE else math.ceil(math.sqrt(len(suspects)))
    return [list(suspects[start : start + size]) for start in range(0, len(suspects), size)]
