"""Many composed pictures ahead of training, as the pixels that the model sees.

Composed at half the side of the shipped pictures: after the image processor's resize the pixels are nearly
the same (tests/model/test_demo_checkpoint.py), at a third of the time.
"""

import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from worker.demo.training import art
from worker.demo.world import COLORS, THINGS, TRAIN_STYLES, Scene, any_picture, compose

#: Pixels: what the checkpoint's image processor resizes to.
IMAGE_SIDE = 64
COMPOSED_SIDE = 128
SHARD_SIZE = 4096

_THINGS, _COLORS = list(THINGS), list(COLORS)


@dataclass(frozen=True)
class Shard:
    """`pixels` is (n, 64, 64, 3) uint8; `contents` is (n, 3) integers: thing, colour, count."""

    pixels: npt.NDArray[np.uint8]
    contents: npt.NDArray[np.int64]

    def picture(self, index: int) -> Scene:
        thing, color, count = self.contents[index]
        return Scene(_THINGS[thing], _COLORS[color], int(count))


def compose_shards(count: int, folder: Path) -> None:
    """Write the shards that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [seed for seed in range(count) if not (folder / f"{seed:03}.npz").exists()]
    with ProcessPoolExecutor(max_workers=2) as workers:
        list(workers.map(_compose_shard, missing, [folder] * len(missing)))


def load_shard(path: Path) -> Shard:
    """A shard as `compose_shards` wrote it."""
    with np.load(path) as stored:
        return Shard(stored["pixels"], stored["contents"])


def seen_by_model(image: Image.Image) -> npt.NDArray[np.uint8]:
    """The picture as the image processor resizes it: (64, 64, 3)."""
    return np.asarray(image.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC))


@cache
def sprite(style: str, thing: str, side: int) -> Image.Image:
    """The thing's sprite, no larger than a picture of `side` pixels needs it."""
    image = art.sprite(style, thing)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def _compose_shard(seed: int, folder: Path) -> None:
    os.nice(5)
    rng = random.Random(f"train {seed}")
    pixels = np.empty((SHARD_SIZE, IMAGE_SIDE, IMAGE_SIDE, 3), np.uint8)
    contents = np.empty((SHARD_SIZE, 3), np.int64)
    for index in range(SHARD_SIZE):
        picture, style = any_picture(rng), rng.choice(TRAIN_STYLES)
        image = compose(picture, partial(sprite, style, side=COMPOSED_SIDE), rng, COMPOSED_SIDE)
        pixels[index] = seen_by_model(image)
        contents[index] = _THINGS.index(picture.thing), _COLORS.index(picture.background), picture.count
    part = folder / f"{seed:03}.part.npz"
    np.savez(part, pixels=pixels, contents=contents)
    part.rename(folder / f"{seed:03}.npz")
