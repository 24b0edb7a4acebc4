"""Who runs again with whom after the model process died: a pure plan.

One of the jobs in flight may have killed it. They run again in groups of about the square root of their number, and
eight or fewer each alone: few deaths find the culprit, and its neighbours succeed. (With 64 in flight and one that
kills: 4 deaths, where halving takes 6, and all alone takes the whole queue's batching away.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

#: Up to so many suspects run alone.
ALONE = 8
#: Deaths of the process with a job alone in it, after which the job has failed.
MAX_DEATHS_ALONE = 2


def groups(suspects: Sequence[T]) -> list[list[T]]:
    """The suspects in the groups that they run in, one group after the other."""
    size = 1 if len(suspects) <= ALONE else math.ceil(math.sqrt(len(suspects)))
    return [list(suspects[start : start + size]) for start in range(0, len(suspects), size)]
