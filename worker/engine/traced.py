"""torch.jit.trace: a network's whole forward pass as one call into torch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

#: Shapes of the first argument for which a graph's first result is compared with the function's; then it is trusted.
CHECKED_SHAPES = 8


class Traced:
    """Runs a function of tensors as a recorded graph, if that gives the same result, bit for bit.

    In Python, every operation of a network releases the interpreter and has to get it back from dozens of threads; a
    graph does so once, and spends a fifth less time between operations. It is recorded by `torch.jit.trace` at the
    first call, and compared with the function at each new shape of the first argument. Threads may share it: if two
    record at once, either graph will do.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        """`function` takes tensors of any shapes and may write to them. Its control flow must not depend on content."""
        self._function = function
        #: By number of arguments.
        self._graphs: dict[int, Callable[..., Tensor]] = {}
        self._checked: dict[int, set[torch.Size]] = {}

    def __call__(self, *arguments: Tensor) -> Tensor:
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
            # Of many kinds, since quantized and distributed layers do things of their own.
            logger.debug("A network cannot be recorded.", exc_info=True)
            return self._function

        def run(*arguments: Tensor) -> Tensor:
            # Without fusing: fused operations round differently.
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                result: Tensor = graph(*arguments)
            return result

        return run

    def _compared(self, graph: Callable[..., Tensor], arguments: Sequence[Tensor]) -> Tensor:
        """The function's result. If the graph's is another, the function is used from now on."""
        copies = [argument.clone() for argument in arguments]
        result = self._function(*arguments)
        try:
            agree = torch.equal(graph(*copies), result) and all(map(torch.equal, copies, arguments))
        except RuntimeError:
            agree = False
        if not agree:
            logger.info("Recorded, this network would answer otherwise: it runs operation by operation.")
            self._graphs[len(arguments)] = self._function
        return result
