"""Numbers and tensors of the host, copied to the device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(numbers: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of numbers or nested lists of them, in the shape of these.

    For a GPU it is copied from pinned memory: otherwise the host would wait until the GPU has done all that it was
    given before.
    """
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def padded(rows: Sequence[Sequence[int]], length: int, fill: int, device: torch.device) -> Tensor:
    """One integer tensor (rows, length) of rows of any lengths, padded with `fill` on the right."""
    return to_device([[*row, *[fill] * (length - len(row))] for row in rows], device)


def upload(content: Tensor, device: torch.device) -> Tensor:
    """A copy on the device of a tensor (any shape) in the host's memory; see `to_device`. On a CPU it is the same."""
    return content.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else content.to(device)
