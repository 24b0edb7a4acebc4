"""The norm that layers share: transformers' numbers, by our operations and by torch's function, which a GPU uses."""

from __future__ import annotations

import pytest
import torch
from transformers.models.idefics.modeling_idefics import IdeficsRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from worker.models.layers import RMSNorm, StockModule


@pytest.mark.parametrize("kind", [LlamaRMSNorm, IdeficsRMSNorm])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_a_norm_is_that_of_transformers(kind: StockModule, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    stock = kind(96, eps=1e-3)
    stock.weight.data = torch.rand(96) + 0.5
    stock = stock.to(dtype)
    # Small numbers, for which `eps` counts.
    states = torch.randn(3, 5, 96).to(dtype) * 0.03
    expected, norm = stock(states), RMSNorm(stock)
    for found in (norm(states), norm.fused(states)):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
