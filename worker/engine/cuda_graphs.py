"""A decode step on a GPU as one launch: recorded once for each shape, then replayed.

A step is hundreds of small kernels: launching them one by one takes the CPU longer than the GPU computes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

#: A step whose arguments stand in fixed places in memory.
Step = Callable[[], Tensor]

#: Recorded shapes that are kept, the latest ones: rows by `bucket`, lengths by the caches' growth.
MAX_GRAPHS = 64


class Graphed:
    """Runs a function of a few numbers for each row, and of caches that it reads and writes, as a recorded graph.

    A graph holds addresses, not tensors: it is replayed only where the caches are the same memory, and keeps none of
    them alive. CUDA graphs as `torch.cuda.graph` records them. For one thread.
    """

    def __init__(self, function: Callable[..., Tensor], record: Callable[[Step], Step]) -> None:
        """`function` takes the numbers (kinds, rows) and the caches. `record` makes a step replayable."""
        self._function = function
        self._record = record
        #: By shape and address: the tensor that the numbers are copied to, and the recorded step.
        self._graphs: OrderedDict[Hashable, tuple[Tensor, Step]] = OrderedDict()

    def __call__(self, numbers: Tensor, caches: Sequence[Tensor]) -> Tensor:
        """The function's result, whose content holds until the next call. `numbers` are (kinds, rows); `caches` of any
        shape."""
        key = numbers.shape, *((cache.data_ptr(), cache.shape, cache.stride()) for cache in caches)
        found = self._graphs.get(key)
        if found is None:
            found = self._graphs[key] = self._recorded(numbers.clone(), caches)
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        place, replay = found
        place.copy_(numbers)
        return replay()

    def _recorded(self, place: Tensor, caches: Sequence[Tensor]) -> tuple[Tensor, Step]:
        return place, self._record(lambda: self._function(place, *caches))


class CudaGraphs:
    """Records steps that never run at the same time on one GPU, so that they share a memory pool."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Libraries allocate and choose at their first calls, which cannot be recorded.
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The encoder's thread uses the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = step()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def bucket(rows: int) -> int:
    """The next power of two, so that there are few shapes to record."""
    return 1 << (rows - 1).bit_length()
