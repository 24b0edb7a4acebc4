"""A step on a GPU as one launch: recorded once for each shape, then replayed.

A decode step is hundreds of small kernels, and to launch them takes a processor longer than the GPU computes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

Step = Callable[[], Tensor]

#: Recorded shapes that are kept, the latest: rows by their bucket, lengths by the caches' growth.
MOST = 64


class Graphed:
    """Runs a function of a few numbers for each row, and of caches that it reads and writes, as a recorded graph.

    A graph knows places in memory, not tensors: it is replayed where the caches are the very same, and keeps none of
    them. CUDA graphs as `torch.cuda.graph` records them. For one thread.
    """

    def __init__(self, function: Callable[..., Tensor], record: Callable[[Step], Step]) -> None:
        """`function` takes the numbers (kinds, rows) and the caches."""
        self._function = function
        self._record = record
        #: With the place that its numbers are read from.
        self._graphs: OrderedDict[Hashable, tuple[Tensor, Step]] = OrderedDict()

    def __call__(self, numbers: Tensor, caches: Sequence[Tensor]) -> Tensor:
        """What the function answers: its content holds until the next call."""
        key = numbers.shape, *((cache.data_ptr(), cache.shape, cache.stride()) for cache in caches)
        found = self._graphs.get(key)
        if found is None:
            found = self._graphs[key] = self._recorded(numbers.clone(), caches)
            if len(self._graphs) > MOST:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        place, replay = found
        place.copy_(numbers)
        return replay()

    def _recorded(self, place: Tensor, caches: Sequence[Tensor]) -> tuple[Tensor, Step]:
        return place, self._record(lambda: self._function(place, *caches))


class CudaGraphs:
    """Records steps of one GPU that never run at the same time: they share what they need between their operations."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            # Libraries allocate and choose at their first calls, which cannot be recorded.
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # The encoder's thread goes on meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            answer = step()

        def replay() -> Tensor:
            graph.replay()
            return answer

        return replay


def bucket(rows: int) -> int:
    """The next power of two: few shapes to record."""
    return 1 << (rows - 1).bit_length()
