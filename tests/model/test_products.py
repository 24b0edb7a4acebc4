"""Products of matrices in recorded networks: the faster library computes large ones, torch's own choice small ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd.profiler import profile

from worker.engine import products
from worker.engine.traced import Traced

ONEDNN = "mkldnn::_linear_pointwise"
INPUTS, OUTPUTS = 256, 1024
#: Rows whose product with the weight is too small for oneDNN, and rows whose product is not.
FEW, MANY = 2, 100


@pytest.fixture
def recorded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Traced]:
    """A linear layer, recorded where oneDNN is faster or not."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param)
    with torch.inference_mode():
        layer = torch.nn.Linear(INPUTS, OUTPUTS)
        traced = Traced(layer)
        traced(torch.randn(1, INPUTS))
        yield traced


def uses_onednn(network: Traced, states: Tensor) -> bool:
    network(states)
    with profile() as calls:
        network(states)
    return any(call.name == ONEDNN for call in calls.function_events)


@pytest.mark.parametrize("recorded", [True], indirect=True)
def test_a_layer_recorded_with_few_rows_is_computed_by_the_faster_library_for_many(recorded: Traced) -> None:
    assert not uses_onednn(recorded, torch.randn(FEW, INPUTS))
    assert uses_onednn(recorded, torch.randn(MANY, INPUTS))
    assert uses_onednn(recorded, torch.randn(5, MANY // 5, INPUTS))


@pytest.mark.parametrize("recorded", [False], indirect=True)
def test_a_layer_is_computed_by_torchs_own_library_where_the_other_is_not_faster(recorded: Traced) -> None:
    assert not uses_onednn(recorded, torch.randn(MANY, INPUTS))


@pytest.mark.parametrize("shape", [(INPUTS,), (FEW, INPUTS), (5, 20, INPUTS), (2, 5, 10, INPUTS)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_both_libraries_compute_the_same_product_to_rounding(
    shape: tuple[int, ...], with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    layer = torch.nn.Linear(INPUTS, OUTPUTS, bias=with_bias)
    states = torch.randn(shape)
    with torch.inference_mode():
        exact = torch.nn.functional.linear(
            states.double(), layer.weight.double(), layer.bias.double() if with_bias else None
        )
        assert torch.allclose(Traced(layer)(states).double(), exact, atol=1e-5)
