"""A picture's pixels as its model takes them: stock arithmetic, looked up in a table instead of computed."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from worker.engine.row import Picture

LEVELS = 256
Levels = NDArray[np.uint8]


class Pixels:
    """Resizes and normalises as transformers' image processor does, bit for bit, in a tenth of its time.

    The value that rescaling and normalising give a byte depends on the byte and its channel only, so it is taken from a
    table that the processor itself has filled. A processor that does more than that is called for each picture.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        ramp = Image.fromarray(np.arange(LEVELS, dtype=np.uint8).repeat(3).reshape(1, LEVELS, 3))
        #: (channels, levels)
        self._table = processor([ramp], do_resize=False, return_tensors="pt")[0][:, 0].numpy()
        noise = Image.fromarray(np.random.default_rng(0).integers(0, LEVELS, (37, 53, 3), dtype=np.uint8))
        self._is_exact = torch.equal(self._normalised(self._resized(noise)), self._stock(noise))

    def picture(self, image: Image.Image) -> Picture:
        """An RGB image as float32 pixels (channels, height, width). Its key is a hash of the bytes before normalising,
        which are fewer to hash."""
        if not self._is_exact:
            pixels = self._stock(image)
            return Picture(_digest(pixels.numpy()), pixels)
        levels = self._resized(image)
        return Picture(_digest(levels), self._normalised(levels))

    def _resized(self, image: Image.Image) -> Levels:
        """An image's bytes at the processor's size: (height, width, channels)."""
        size = self._processor.size
        return np.asarray(image.resize((size["width"], size["height"]), self._processor.resample))

    def _normalised(self, levels: Levels) -> Tensor:
        """Bytes (height, width, channels) as float32 pixels (channels, height, width)."""
        pixels = np.empty((levels.shape[2], *levels.shape[:2]), self._table.dtype)
        for channel, table in enumerate(self._table):
            # Clipping changes nothing, and lets numpy write in place.
            np.take(table, levels[..., channel], out=pixels[channel], mode="clip")
        return torch.from_numpy(pixels)

    def _stock(self, image: Image.Image) -> Tensor:
        """The processor's own pixels (channels, height, width) of an image."""
        pixels: Tensor = self._processor([image], return_tensors="pt")[0]
        return pixels


def _digest(content: NDArray[Any]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(content).data, digest_size=16).digest()
