"""The library that multiplies matrices in recorded networks: oneDNN where it is faster than torch's own choice.

For float32 torch calls MKL, which uses AVX-512 on Intel's processors only. oneDNN, which torch also brings, uses it on
every processor that has it: an AMD EPYC of 2024 then computes a product in half the time. Sums are rounded in another
order, as they are in MKL for another number of rows.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

#: Multiplications from which on oneDNN computes a product. A call of it takes 10 microseconds more.
MIN_MULTIPLICATIONS = 3_000_000
#: oneDNN is used if it takes less than this part of torch's time.
MAX_TIME = 0.8
#: Rows and columns of the matrices that are multiplied to find that out, and how often.
_MEASURED_SIZE, _MEASURED_TIMES = 512, 8

#: From states (..., inputs), a weight (outputs, inputs) and a bias (outputs,) to (..., outputs).
Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# A script, since a graph is used for other numbers of rows than it is recorded with.
_SCRIPTS = f"""
def onednn(states, weight, bias: Optional[Tensor]):
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")

def faster(states, weight, bias: Optional[Tensor]):
    if states.numel() * weight.size(0) < {MIN_MULTIPLICATIONS}:
        return torch.ops.aten.linear(states, weight, bias)
    return onednn(states, weight, bias)
"""


class FasterProducts(TorchFunctionMode):
    """While it is active in a thread, torch's linear layers there use the faster library."""

    def __init__(self) -> None:
        super().__init__()
        # Found out here, since what is computed while it is active may be recorded.
        self._is_needed = onednn_is_faster()

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        is_replaced = func is linear and self._is_needed
        return (_product if is_replaced else func)(*args, **(kwargs or {}))


def _product(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer of `states` (..., inputs), `weight` (outputs, inputs) and `bias` (outputs,)."""
    is_suited = weight.device.type == "cpu" and weight.dtype == states.dtype == torch.float32
    product: Linear = _scripts().faster if is_suited else linear
    return product(states, weight, bias)


@functools.cache
def _scripts() -> Any:
    """The functions of _SCRIPTS. A torch without oneDNN cannot compile them."""
    return torch.jit.CompilationUnit(_SCRIPTS)


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 matrices notably faster than torch's own choice here; measured once."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    states, weight = torch.randn(2, _MEASURED_SIZE, _MEASURED_SIZE).unbind()
    # By turns, and the fastest of several calls: other programs may slow the processor down for some of them.
    pairs = [
        (_processor_s(_scripts().onednn, states, weight), _processor_s(linear, states, weight))
        for _ in range(_MEASURED_TIMES)
    ]
    return min(onednn_s for onednn_s, _ in pairs) < MAX_TIME * min(torch_s for _, torch_s in pairs)


def _processor_s(product: Linear, states: Tensor, weight: Tensor) -> float:
    """Seconds of processor time that one call takes in this thread: without those in which other threads have it."""
    started = time.thread_time()
    product(states, weight, None)
    return time.thread_time() - started
