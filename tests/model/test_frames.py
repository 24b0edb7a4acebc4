"""Frames are those of transformers' image processors bit for bit, in a quarter of their memory."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Idefics2ImageProcessorPil, Idefics3ImageProcessorPil, SmolVLMImageProcessorPil

from worker.models.idefics2_3.frames import FrameCutter, Frames

#: Small ones, so that many sizes take little time, and those of the published checkpoints.
SMALL: list[Any] = [
    Idefics2ImageProcessorPil(size={"shortest_edge": 12, "longest_edge": 33}, do_image_splitting=True),
    Idefics2ImageProcessorPil(size={"shortest_edge": 12, "longest_edge": 33}, do_image_splitting=False),
    Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 14}),
    Idefics3ImageProcessorPil(size={"longest_edge": 14}, max_image_size={"longest_edge": 14}),
    SmolVLMImageProcessorPil(
        size={"longest_edge": 60}, max_image_size={"longest_edge": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ),
    SmolVLMImageProcessorPil(size={"longest_edge": 60}, max_image_size={"longest_edge": 16}, do_image_splitting=False),
]
PUBLISHED: list[Any] = [
    Idefics2ImageProcessorPil(do_image_splitting=True, size={"longest_edge": 980, "shortest_edge": 378}),
    Idefics3ImageProcessorPil(size={"longest_edge": 1456}, max_image_size={"longest_edge": 364}),
    SmolVLMImageProcessorPil(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}),
    SmolVLMImageProcessorPil(size={"longest_edge": 1536}, max_image_size={"longest_edge": 384}),
]


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3))


def cutter_of(processor: Any) -> FrameCutter:
    return FrameCutter(processor, splits_into_tiles=not isinstance(processor, Idefics2ImageProcessorPil))


def assert_the_same(processor: Any, cutter: FrameCutter, image: Image.Image) -> None:
    tiled = not isinstance(processor, Idefics2ImageProcessorPil)
    stock = processor([[image]], return_tensors="pt", **({"return_row_col_info": True} if tiled else {}))
    made, rows, columns = cutter.frames(image)
    assert made.pixels.dtype == torch.uint8
    assert torch.equal(made.mask, stock["pixel_attention_mask"][0].bool()), image.size
    assert torch.equal(made.normalize(made.pixels, made.mask), stock["pixel_values"][0]), image.size
    if tiled:
        assert (rows, columns) == (stock["rows"][0][0], stock["cols"][0][0]), image.size


@pytest.mark.parametrize("processor", SMALL, ids=range(len(SMALL)))
def test_frames_of_any_size_are_the_processors(processor: Any) -> None:
    rng, cutter = random.Random(0), cutter_of(processor)
    sides = [2, 3, 7, 12, 13, 14, 15, 16, 28, 33, 34, 55, 56, 57, 112, 113]
    sizes = [(rng.choice(sides), rng.choice(sides)) for _ in range(150)] + [(300, 2), (2, 300), (1, 40), (900, 3)]
    for seed, size in enumerate(sizes):
        assert_the_same(processor, cutter, noise(size, seed))


@pytest.mark.parametrize("processor", PUBLISHED, ids=range(len(PUBLISHED)))
def test_frames_of_published_processors_are_theirs(processor: Any) -> None:
    cutter = cutter_of(processor)
    for seed, size in enumerate([(640, 480), (480, 641), (1999, 1001), (50, 50)]):
        assert_the_same(processor, cutter, noise(size, seed))


@pytest.mark.parametrize(
    "processor",
    [
        Idefics2ImageProcessorPil(size={"height": 20, "width": 30}),
        Idefics3ImageProcessorPil(
            size={"longest_edge": 28}, max_image_size={"longest_edge": 14}, do_rescale=False, do_normalize=False
        ),
        Idefics3ImageProcessorPil(size={"longest_edge": 28}, max_image_size={"longest_edge": 14}, do_resize=False),
    ],
    ids=["a fixed size", "no values", "no scaling"],
)
def test_a_processor_that_does_something_else_is_called_itself(processor: Any) -> None:
    image = noise((41, 23), 0)
    made, *_ = cutter_of(processor).frames(image)
    assert made.pixels.dtype == torch.float32
    assert torch.equal(made.pixels, processor([[image]], return_tensors="pt")["pixel_values"][0].float())


def test_a_picture_is_a_quarter_of_its_values_and_equal_ones_have_equal_keys() -> None:
    cutter = cutter_of(PUBLISHED[2])
    frames: list[Frames] = [cutter.frames(noise((640, 480), seed))[0] for seed in (0, 0, 1)]
    assert frames[0].nbytes == pytest.approx(13 * 3 * 512 * 512, rel=0.01)
    assert frames[0].key == frames[1].key != frames[2].key
