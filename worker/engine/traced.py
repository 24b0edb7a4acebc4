"""A network's whole forward pass as one call into torch, by torch.jit.trace."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

#: For this many shapes of the first argument, a graph's first result is compared with the function's.
CHECKED_SHAPES = 8


class Traced:
    """Runs a function of tensors as a recorded graph, if the graph gives the same result bit for bit.

    In Python, each operation of a network releases the interpreter lock and competes for it with dozens of threads. A
    graph does so once, and spends a fifth less time between operations. `torch.jit.trace` records it at the first call;
    at new shapes of the first argument it is compared with the function. Thread-safe: if two threads record at once,
    either graph may be used.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        """`function` takes tensors of any shapes and may write to them. Its control flow must not depend on values."""
        self._function = function
        #: By number of arguments.
        self._graphs: dict[int, Callable[..., Tensor]] = {}
        self._checked: dict[int, set[torch.Size]] = {}

    def __call__(self, *arguments: Tensor) -> Tensor:
        """The function's result, for tensors of the shapes that it takes."""
        graph = self._graphs.get(len(arguments))
        if graph is None:
            graph = self._graphs[len(arguments)] = self._record(arguments)
        checked = self._checked.setdefault(len(arguments), set())
        shape = arguments[0].shape
        if graph is self._function or shape in checked or len(checked) >= CHECKED_SHAPES:
            return graph(*arguments)
        checked.add(shape)
        return self._compared(graph, arguments)

    def _record(self, arguments: Sequence[Tensor]) -> Callable[..., Tensor]:
        copies = tuple(argument.clone() for argument in arguments)
        try:
            with warnings.catch_warnings():
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

    def _compared(self, graph: Callable[..., Tensor], arguments: Sequence[Tensor]) -> Tensor:
        """The function's result. If the graph's result differs, the function replaces the graph from now on."""
        copies = [argument.clone() for argument in arguments]
        result = self._function(*arguments)
        try:
            agree = torch.equal(graph(*copies), result) and all(map(torch.equal, copies, arguments))
        except RuntimeError:
            agree = False
        if not agree:
            logger.info("The recorded network gives another result; it runs operation by operation.")
            self._graphs[len(arguments)] = self._function
        return result
