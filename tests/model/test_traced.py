"""Recorded graphs and looked-up pixels: the same numbers as without, or not used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import IdeficsImageProcessorPil

from worker.engine.traced import Traced
from worker.models.image_processor import Pixels


class _Writer(torch.nn.Module):
    """Writes to its second argument, as the decoder's layers write to their caches."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.plain_calls = 0

    def forward(self, states: Tensor, cache: Tensor) -> Tensor:
        self.plain_calls += 1
        new: Tensor = self.linear(states)
        cache.index_put_((torch.arange(len(states)),), new)
        return new + cache.sum()


@torch.inference_mode()
def test_a_graph_answers_and_writes_as_its_function_at_every_number_of_rows() -> None:
    function = _Writer().eval()
    traced = Traced(function)
    for rows in (1, 3, 2, 3, 1):
        states, cache = torch.randn(rows, 4), torch.zeros(5, 4)
        expected_cache = torch.zeros(5, 4)
        expected = function(states, expected_cache)
        assert torch.equal(traced(states, cache), expected)
        assert torch.equal(cache, expected_cache)


@torch.inference_mode()
def test_a_known_shape_costs_no_plain_call() -> None:
    function = _Writer().eval()
    traced = Traced(function)
    traced(torch.randn(2, 4), torch.zeros(5, 4))
    calls = function.plain_calls
    traced(torch.randn(2, 4), torch.zeros(5, 4))
    assert function.plain_calls == calls


@torch.inference_mode()
def test_a_function_that_a_graph_gets_wrong_runs_plainly() -> None:
    def of_rows(states: Tensor) -> Tensor:
        # Recorded, the number of rows is that of the first call.
        return states * len(states.tolist())

    traced = Traced(of_rows)
    for rows in (1, 3, 2, 3):
        states = torch.ones(rows, 2)
        assert torch.equal(traced(states), of_rows(states))


def cropping() -> IdeficsImageProcessorPil:
    processor = IdeficsImageProcessorPil(image_size=64, do_resize=True)
    processor.do_center_crop = True
    processor.crop_size = processor.size.__class__(height=32, width=32)
    return processor


def assert_pixels_are_stock(processor: IdeficsImageProcessorPil, image: Image.Image) -> None:
    pixels = Pixels(processor)
    kept = pixels.picture(image).pixels
    assert kept is not None
    assert torch.equal(pixels.normalized(kept), processor([image], return_tensors="pt")[0])


@pytest.mark.parametrize("size", [(64, 64), (31, 200), (640, 480)])
def test_pixels_are_the_stock_processors(size: tuple[int, int]) -> None:
    processor = IdeficsImageProcessorPil(image_size=64)
    noise = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    assert_pixels_are_stock(processor, image)
    assert Pixels(processor).picture(image).nbytes == 3 * 64 * 64


def test_a_processor_with_other_steps_is_not_replaced() -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (80, 90, 3), dtype=np.uint8))
    assert_pixels_are_stock(cropping(), image)


@pytest.mark.parametrize("processor", [IdeficsImageProcessorPil(image_size=64), cropping()])
def test_a_picture_is_known_by_its_pixels(processor: IdeficsImageProcessorPil) -> None:
    pixels = Pixels(processor)
    black, white, again = (pixels.picture(Image.new("RGB", (80, 80), colour)) for colour in ("black", "white", "black"))
    assert black.key == again.key != white.key
