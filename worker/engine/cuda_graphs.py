"""CUDA graphs of decode steps: recorded once for each shape, then replayed with one launch.

A step is hundreds of small kernels. Launching them one by one takes the CPU longer than the GPU takes to run them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from worker.engine.traced import TABLE_DIMENSIONS

#: A step whose arguments have fixed addresses in memory.
Step = Callable[[], Tensor]

#: Maximum graphs that are kept, the least recently used are dropped. Rows are rounded up by `bucket`, lengths by
#: KVCache.rounded, so that there are few shapes.
MAX_GRAPHS = 64


class Graphed:
    """Runs a function of a small tensor and of caches, which it reads and writes, as a recorded graph.

    A graph holds addresses, not tensors: it is replayed only if the caches are at the same addresses, and does not keep
    them alive. Not thread-safe.
    """

    def __init__(self, function: Callable[..., Tensor], record: Callable[[Step], Step]) -> None:
        """`function` takes the numbers (kinds, rows) and the caches. `record` turns a step into a replayable one."""
        self._function = function
        self._record = record
        #: By shape and address: the tensors that the inputs are copied to, and the recorded step.
        self._graphs: OrderedDict[Hashable, tuple[Sequence[Tensor], Step]] = OrderedDict()

    def __call__(self, numbers: Tensor, self_kv: Sequence[Tensor], extra: Sequence[Tensor] = ()) -> Tensor:
        """The function's result, valid until the next call. `numbers`: (kinds, rows); `self_kv` and `extra`: see
        interfaces.Decoder."""
        # A block table changes with the rows, while the blocks stay where they are.
        tables = [cache for cache in self_kv if cache.dim() == TABLE_DIMENSIONS]
        inputs, caches = [numbers, *tables], [*self_kv[len(tables) :], *extra]
        key = (
            *(tensor.shape for tensor in inputs),
            *((cache.data_ptr(), cache.shape, cache.stride()) for cache in caches),
        )
        found = self._graphs.get(key)
        if found is None:
            found = self._graphs[key] = self._recorded([tensor.clone() for tensor in inputs], caches)
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        places, replay = found
        for place, tensor in zip(places, inputs, strict=True):
            place.copy_(tensor)
        return replay()

    def _recorded(self, places: Sequence[Tensor], caches: Sequence[Tensor]) -> tuple[Sequence[Tensor], Step]:
        return places, self._record(lambda: self._function(*places, *caches))


class CudaGraphs:
    """Records steps as CUDA graphs. They share a memory pool, so they must not run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Libraries allocate memory and choose algorithms in their first calls, which cannot be recorded.
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The encoder thread may use the GPU at the same time.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = step()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def bucket(rows: int) -> int:
    """The number of rows rounded up to a power of two, so that few shapes are recorded."""
    return 1 << (rows - 1).bit_length()
