"""Images as frames: cut, scaled and padded as transformers' image processors do it, bit for bit, kept as bytes.

The processors copy an image at each step, and end with 32-bit floats. Here Pillow scales the image and its bytes are
kept, a quarter of the size. They are rescaled and normalised, by a table, when the image is encoded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from worker.engine.row import Picture
from worker.models.image_processor import LEVELS, ByteTable

#: Maximum pixels of a side of a scaled image in Idefics3.
LONGEST = 4096


class Normalizer:
    """Rescales and normalises bytes as a processor does, by a table of the value of each byte in each channel."""

    def __init__(self, processor: Any) -> None:
        ramp = np.broadcast_to(np.arange(LEVELS, dtype=np.uint8), (3, 1, LEVELS))
        values = processor.rescale(ramp, processor.rescale_factor)
        values = processor.normalize(values, processor.image_mean, processor.image_std)
        self._table = ByteTable(torch.from_numpy(np.ascontiguousarray(values[:, 0])))

    def __call__(self, pixels: Tensor, mask: Tensor | None = None) -> Tensor:
        """From bytes (..., channels, height, width) to values of the same shape on the same device. Floats are returned
        unchanged.

        The value is 0 where `mask` (..., height, width) is False; None: nowhere.
        """
        if pixels.is_floating_point():
            return pixels
        values = self._table(pixels)
        return values if mask is None else values.masked_fill_(~mask.unsqueeze(-3), 0.0)


class Frame(NamedTuple):
    """A part of an image, or the whole of it, which the vision tower encodes separately."""

    #: Bytes, or values that are normalised already (channels, height, width).
    pixels: Tensor
    #: (height, width): False for padding.
    mask: Tensor
    normalize: Normalizer


@dataclass(frozen=True, slots=True)
class Frames(Picture):
    """One image as its frames."""

    #: Bytes, or normalised values (frames, channels, height, width).
    pixels: Tensor
    #: (frames, height, width): False where a frame is padded to the size of the largest.
    mask: Tensor
    #: What the image is in a prompt's text.
    text: str
    normalize: Normalizer

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels and the mask."""
        return self.pixels.nbytes + self.mask.untyped_storage().nbytes()

    @property
    def frames(self) -> Sequence[Frame]:
        """The frames, one by one."""
        return [Frame(*parts, self.normalize) for parts in zip(self.pixels, self.mask, strict=True)]


class Cut(NamedTuple):
    """An image's frames, and the number of rows and columns of tiles; 0 if it was not cut into tiles."""

    frames: Sequence[Image.Image]
    rows: int = 0
    columns: int = 0


class FrameCutter:
    """Cuts images into frames as a processor does. If its results differ from the processor's, it calls the
    processor."""

    def __init__(self, processor: Any, *, splits_into_tiles: bool) -> None:
        """`splits_into_tiles`: True for the processor of Idefics3 and SmolVLM, False for that of Idefics2."""
        self._processor = processor
        self._tiled = splits_into_tiles
        self._cut = self._tiles if splits_into_tiles else self._quarters
        self._normalize = Normalizer(processor)
        noise = np.random.default_rng(0).integers(0, LEVELS, (37, 53, 3), dtype=np.uint8)
        self._is_exact = self._agrees_on(Image.fromarray(noise))

    def frames(self, image: Image.Image) -> tuple[Frames, int, int]:
        """The frames of an RGB image, without text, and the number of rows and columns of tiles."""
        if not self._is_exact:
            return self._stock(image)
        cut = self._cut(image)
        width, height = (max(frame.size[n] for frame in cut.frames) for n in (0, 1))
        pixels = np.zeros((len(cut.frames), 3, height, width), np.uint8)
        for place, frame in enumerate(cut.frames):
            pixels[place, :, : frame.height, : frame.width] = np.asarray(frame).transpose(2, 0, 1)
        sizes = [frame.size for frame in cut.frames]
        # The key includes the sizes, since an upright and a landscape image may have the same bytes.
        key = hashlib.blake2b(repr(sizes).encode(), digest_size=16)
        key.update(pixels.data)
        picture = Frames(key.digest(), torch.from_numpy(pixels), _mask(sizes, height, width), "", self._normalize)
        return picture, cut.rows, cut.columns

    def _agrees_on(self, image: Image.Image) -> bool:
        stock, *placed = self._stock(image)
        self._is_exact = True
        try:
            made, *found = self.frames(image)
        except (KeyError, TypeError, AttributeError):
            # The processor's sizes have another form.
            return False
        return (
            placed == found
            and torch.equal(made.mask, stock.mask)
            and torch.equal(made.normalize(made.pixels, made.mask), stock.pixels)
        )

    def _stock(self, image: Image.Image) -> tuple[Frames, int, int]:
        keywords = {"return_row_col_info": True} if self._tiled else {}
        made = self._processor([[image]], return_tensors="pt", **keywords)
        pixels: Tensor = made["pixel_values"][0].float()
        mask: Tensor = made["pixel_attention_mask"][0].bool()
        key = hashlib.blake2b(repr(tuple(pixels.shape)).encode(), digest_size=16)
        key.update(pixels.numpy().data)
        key.update(mask.numpy().data)
        rows, columns = (made[name][0][0] if self._tiled else 0 for name in ("rows", "cols"))
        return Frames(key.digest(), pixels, mask, "", self._normalize), rows, columns

    def _quarters(self, image: Image.Image) -> Cut:
        """Idefics2's frames: the image's four quarters, if the processor splits images, then the whole image."""
        size = self._processor.size
        parts = [*(_quarters(image) if self._processor.do_image_splitting else ()), image]
        return Cut(
            [self._resized(part, _within(part.size, size["shortest_edge"], size["longest_edge"])) for part in parts]
        )

    def _tiles(self, image: Image.Image) -> Cut:
        """Idefics3's frames: the tiles of the scaled image, row by row, then the whole image."""
        side = self._processor.max_image_size["longest_edge"]
        image = self._resized(image, _scaled(image.size, self._processor.size["longest_edge"]))
        if not self._processor.do_image_splitting:
            return Cut([self._resized(image, (side, side))])
        image = self._resized(image, _in_tiles(image.size, side))
        columns, rows = image.width // side, image.height // side
        if rows == columns == 1:
            return Cut([image])
        tiles = [
            image.crop((column * side, row * side, (column + 1) * side, (row + 1) * side))
            for row in range(rows)
            for column in range(columns)
        ]
        return Cut([*tiles, self._resized(image, (side, side))], rows, columns)

    def _resized(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        return image.resize(size, self._processor.resample)


def _quarters(image: Image.Image) -> list[Image.Image]:
    width, height = image.size
    x, y = width // 2, height // 2
    boxes = [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]
    return [image.crop(box) for box in boxes]


def _mask(sizes: Sequence[tuple[int, int]], height: int, width: int) -> Tensor:
    """The mask (frames, height, width), True inside each frame. `sizes`: each frame's width and height in pixels."""
    if all(size == (width, height) for size in sizes):
        return torch.ones((), dtype=torch.bool).expand(len(sizes), height, width)
    mask = torch.zeros(len(sizes), height, width, dtype=torch.bool)
    for place, (own_width, own_height) in enumerate(sizes):
        mask[place, :own_height, :own_width] = True
    return mask


# Sizes are (width, height) in pixels, rounded as the processors round them.


def _within(size: tuple[int, int], shortest: int, longest: int) -> tuple[int, int]:
    """A size in Idefics2: both sides at most `longest`, with the same ratio, then at least `shortest`."""
    width, height = size
    ratio = width / height
    if width >= height and width > longest:
        width, height = longest, int(longest / ratio)
    elif height > width and height > longest:
        width, height = int(longest * ratio), longest
    return max(width, shortest), max(height, shortest)


def _scaled(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """A size in Idefics3: the longer side is `longest`, the other one even, and both are at most LONGEST."""
    width, height = size
    ratio = width / height
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        width, height = int(longest * ratio), longest
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    ratio = width / height
    if width >= height and width > LONGEST:
        width, height = LONGEST, int(LONGEST / ratio)
    elif height > width and height > LONGEST:
        width, height = int(LONGEST * ratio), LONGEST
    return max(width, 1), max(height, 1)


def _in_tiles(size: tuple[int, int], side: int) -> tuple[int, int]:
    """A size in Idefics3: both sides rounded up to multiples of `side`, the longer one first."""
    width, height = size
    ratio = width / height
    if width >= height:
        width = math.ceil(width / side) * side
        height = math.ceil(int(width / ratio) / side) * side
    else:
        height = math.ceil(height / side) * side
        width = math.ceil(int(height * ratio) / side) * side
    return width, height
