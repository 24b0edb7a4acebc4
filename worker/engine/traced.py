"""A network's whole forward pass as one call into torch, by torch.jit.trace."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from worker.engine.products import FasterProducts

logger = logging.getLogger(__name__)

#: For this many shapes of the first argument, a graph's first result is compared with the function's.
CHECKED_SHAPES = 8
#: A block table is the only one of the caches' tensors with so few.
TABLE_DIMENSIONS = 2


class Traced:
    """Runs a function of tensors as a recorded graph, if the graph gives the same result bit for bit.

    In Python, each operation of a network releases the interpreter lock and competes for it with dozens of threads. A
    graph does so once, and spends a fifth less time between operations. Its linear layers use the faster library (see
    worker/engine/products.py). `torch.jit.trace` records it at the first call; at new shapes of the first argument it
    is compared with the function. Thread-safe: if two threads record at once, either graph may be used.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        """`function` takes tensors of any shapes and may write to them. Its control flow must not depend on values."""
        self._function = function
        #: By number of arguments.
        self._graphs: dict[int, Callable[..., Tensor]] = {}
        self._checked: dict[int, set[torch.Size]] = {}

    def __call__(self, *inputs: Tensor, self_kv: Sequence[Tensor] = (), extra: Sequence[Tensor] = ()) -> Tensor:
        """The function's result, for tensors of the shapes that it takes: `inputs`, then the caches `self_kv` and
        `extra`, if it reads or writes any (see interfaces.Decoder)."""
        arguments = Arguments(inputs, self_kv, extra)
        count = len(arguments.all)
        graph = self._graphs.get(count)
        if graph is None:
            graph = self._graphs[count] = self._record(arguments)
        checked = self._checked.setdefault(count, set())
        shape = inputs[0].shape
        if graph is self._function or shape in checked or len(checked) >= CHECKED_SHAPES:
            return graph(*arguments.all)
        checked.add(shape)
        return self._compared(graph, arguments)

    def _record(self, arguments: Arguments) -> Callable[..., Tensor]:
        copies = arguments.copied().all
        try:
            with warnings.catch_warnings(), FasterProducts():
                warnings.simplefilter("ignore")
                graph = torch.jit.trace(self._function, copies, check_trace=False)  # type: ignore[no-untyped-call]
        except Exception:
            # Of any type: quantized and distributed layers raise their own errors.
            logger.debug("A network cannot be recorded; it runs operation by operation.", exc_info=True)
            return self._function

        def run(*arguments: Tensor) -> Tensor:
            # Fused operations would round differently.
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                result: Tensor = graph(*arguments)
            return result

        return run

    def _compared(self, graph: Callable[..., Tensor], arguments: Arguments) -> Tensor:
        """The function's result. If the graph's result differs, the function replaces the graph from now on."""
        copies = arguments.copied()
        with FasterProducts():
            result = self._function(*arguments.all)
        try:
            agree = torch.equal(graph(*copies.all), result) and all(
                map(torch.equal, copies.all, arguments.copied().all)
            )
        except RuntimeError:
            agree = False
        if not agree:
            logger.info("The recorded network gives another result; it runs operation by operation.")
            self._graphs[len(arguments.all)] = self._function
        return result


class Arguments(NamedTuple):
    """The arguments of a traced function."""

    inputs: Sequence[Tensor]
    self_kv: Sequence[Tensor]
    extra: Sequence[Tensor]

    @property
    def all(self) -> tuple[Tensor, ...]:
        """All tensors in order."""
        return *self.inputs, *self.self_kv, *self.extra

    def copied(self) -> Arguments:
        """Copies, in which functions give the same results. Of a pool of blocks, which may fill the device's memory,
        only the blocks in the block table are copied."""
        inputs, extra = ([tensor.clone() for tensor in tensors] for tensors in (self.inputs, self.extra))
        if not self.self_kv or self.self_kv[0].dim() != TABLE_DIMENSIONS:
            return Arguments(inputs, [tensor.clone() for tensor in self.self_kv], extra)
        table, *pools = self.self_kv
        # Sorted: the null block is the first, and the block for padding the last.
        used = torch.unique(torch.cat((table.flatten(), table.new_tensor([0, len(pools[0]) - 1]))))
        return Arguments(inputs, [torch.searchsorted(used, table.contiguous()), *(pool[used] for pool in pools)], extra)
