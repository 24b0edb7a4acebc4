"""A network's whole forward as one call into torch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

#: Shapes of the first argument whose first call is also made the plain way, before the graph is trusted.
CHECKED_SHAPES = 8


class Traced:
    """Runs a function of tensors as a recorded graph, where that gives the same, bit for bit.

    In Python, every operation of a network lets go of the interpreter and has to get it back from dozens of threads;
    a graph does so once, and spends a fifth less time between operations. It is recorded at the first call (by
    `torch.jit.trace`) and compared with the function at every new shape of the first. Threads may share it: where two
    record at once, either's graph will do.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        """`function` takes tensors, and may write to them; it does not look at their content."""
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
            # Without fusing: fused operations round otherwise.
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                answer: Tensor = graph(*arguments)
            return answer

        return run

    def _compared(self, graph: Callable[..., Tensor], arguments: Sequence[Tensor]) -> Tensor:
        copies = [argument.clone() for argument in arguments]
        answer = self._function(*arguments)
        try:
            agree = torch.equal(graph(*copies), answer) and all(map(torch.equal, copies, arguments))
        except RuntimeError:
            agree = False
        if not agree:
            logger.info("Recorded, this network would answer otherwise: it runs operation by operation.")
            self._graphs[len(arguments)] = self._function
        return answer
