"""Lists of numbers as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def padded(rows: Sequence[Sequence[int]], length: int, fill: int, device: torch.device) -> Tensor:
    """One integer tensor (rows, length) of rows of any lengths, padded with `fill` on the right."""
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], device=device)
