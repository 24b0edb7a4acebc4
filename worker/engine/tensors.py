"""Lists of numbers as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def padded(rows: Sequence[Sequence[int]], length: int, fill: int, device: torch.device) -> Tensor:
    """Rows of any lengths as one tensor (rows, length) of integers, filled up on the right."""
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], device=device)
