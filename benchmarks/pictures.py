"""Pictures for the jobs that are measured. They all differ, so that no cache has one from an earlier round."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tasks import ImagePath

DRAWINGS = Path(__file__).parents[1] / "worker" / "demo" / "pictures"
#: Pixels.
NOISE_EDGE = 16
#: Pixels of an ordinary picture's sides.
ORDINARY_EDGES = (224, 800)
#: Pixels of a large picture: 12 megapixels, as phones take them.
LARGE_SIZE = (4000, 3000)
#: A photograph's light: edges of the noise that is scaled up to its size, with each one's share.
OCTAVES = ((2, 0.5), (7, 0.3), (29, 0.2))
#: Coloured things in a photograph.
SHAPES = 6
#: Maximum levels by which a camera's noise changes a photograph's bytes.
GRAIN = 6
QUALITY = 90


class PictureBook(ABC):
    """Makes pictures on demand in a folder, the same ones each time."""

    def __init__(self, root: Path, size: tuple[int, int] | None = None) -> None:
        """`size`: width and height of all pictures; None: as is usual for their kind."""
        self._root = root
        self._size = size
        self._count = 0

    def new(self) -> ImagePath:
        """Make one picture."""
        number, self._count = self._count, self._count + 1
        return ImagePath(path=self._save(number))

    @abstractmethod
    def _save(self, number: int) -> str:
        """Save a picture, and return its name."""


class Drawings(PictureBook):
    """The bundled model's flat drawings, as PNG of 256 pixels."""

    def __init__(self, root: Path, size: tuple[int, int] | None = None) -> None:
        super().__init__(root, size)
        sources = [Image.open(path).convert("RGB") for path in sorted(DRAWINGS.glob("*.png"))]
        self._sources = [source.resize(size) for source in sources] if size else sources

    def _save(self, number: int) -> str:
        # Noise in its corner: enough to differ when it is scaled down, too.
        picture = self._sources[number % len(self._sources)].copy()
        noise = random.Random(number).randbytes(3 * NOISE_EDGE**2)
        picture.paste(Image.frombytes("RGB", (NOISE_EDGE, NOISE_EDGE), noise))
        name = f"{number:06}.png"
        picture.save(self._root / name)
        return name


class OrdinaryPictures(PictureBook):
    """What looks like photographs to a decoder: PNG and JPEG by turns, with sides of ORDINARY_EDGES pixels."""

    def _save(self, number: int) -> str:
        shortest, longest = ORDINARY_EDGES
        rng = random.Random(number)
        size = self._size or (rng.randint(shortest, longest), rng.randint(shortest, longest))
        picture = photograph(number, size)
        name = f"{number:06}.{'jpg' if number % 2 else 'png'}"
        picture.save(self._root / name, quality=QUALITY)
        return name


class LargePictures(PictureBook):
    """JPEG of LARGE_SIZE."""

    def _save(self, number: int) -> str:
        name = f"{number:06}.jpg"
        photograph(number, self._size or LARGE_SIZE).save(self._root / name, quality=QUALITY)
        return name


def photograph(seed: int, size: tuple[int, int]) -> Image.Image:
    """A picture of gradients, shapes and noise."""
    rng = np.random.default_rng(seed)
    light = Image.new("RGB", size)
    share = 0.0
    for edge, weight in OCTAVES:
        noise = Image.fromarray(rng.integers(0, 256, (edge, edge, 3), dtype=np.uint8))
        share += weight
        light = Image.blend(light, noise.resize(size, Image.Resampling.BICUBIC), weight / share)
    draw = ImageDraw.Draw(light)
    for _ in range(SHAPES):
        left, right = sorted(rng.integers(0, size[0], 2).tolist())
        top, bottom = sorted(rng.integers(0, size[1], 2).tolist())
        draw.ellipse((left, top, right, bottom), fill=tuple(rng.integers(0, 256, 3).tolist()))
    grain = rng.integers(-GRAIN, GRAIN + 1, (size[1], size[0], 3), dtype=np.int16)
    return Image.fromarray((np.asarray(light) + grain).clip(0, 255).astype(np.uint8))


PICTURES: dict[str, Callable[[Path, tuple[int, int] | None], PictureBook]] = {
    "drawn": Drawings,
    "ordinary": OrdinaryPictures,
    "large": LargePictures,
}
