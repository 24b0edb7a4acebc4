"""A CUDA stream of a thread's own, so that its kernels and those of other threads need not wait for each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Keyed = TypeVar("Keyed")
#: Tensors of any shapes, each with what it belongs to.
Results = Sequence[tuple[Keyed, Tensor]]


def at_once(work: Callable[[], Results[Keyed]]) -> Results[Keyed]:
    """The results of `work`, on a device where they are complete when it returns."""
    return work()


class CudaStream:
    """Runs work on a stream of its own. The calling thread waits for the results; the device's other work goes on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # The thread sleeps until then, instead of asking again and again.
        self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def __call__(self, work: Callable[[], Results[Keyed]]) -> Results[Keyed]:
        """The results of `work`, complete, so that any stream may read them."""
        with torch.cuda.stream(self._stream):
            results = work()
        self._done.record(self._stream)
        self._done.synchronize()
        reader = torch.cuda.default_stream(self._device)
        for _, result in results:
            # Otherwise the allocator would give a result's memory to this stream again as soon as the last reference is
            # gone, while the engine's kernels may still read it.
            result.record_stream(reader)
        return results
