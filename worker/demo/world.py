"""The small world that the demo model knows: things, colours, and pictures of them. No torch here."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent

#: Art styles that the model is trained on, then the one kept back to see how it does on a new one.
TRAIN_STYLES = ("noto", "twemoji", "fluent")
HELD_OUT_STYLE = "openmoji"
STYLES = (*TRAIN_STYLES, HELD_OUT_STYLE)


@dataclass(frozen=True)
class Thing:
    """One kind of thing that a picture can show."""

    name: str
    category: str
    plural: str
    fact: str
    code: str


@dataclass(frozen=True)
class Scene:
    """The content of a picture, which determines the answer to any question about it."""

    thing: str
    background: str
    count: int


_vocabulary = json.loads((HERE / "vocabulary.json").read_text())
THINGS = {name: Thing(name=name, **rest) for name, rest in _vocabulary["things"].items()}
CATEGORIES: tuple[str, ...] = tuple(_vocabulary["categories"])
COLORS: dict[str, tuple[int, int, int]] = {name: tuple(rgb) for name, rgb in _vocabulary["colors"].items()}


def any_picture(rng: random.Random) -> Scene:
    """A random scene; all scenes have the same probability."""
    return Scene(rng.choice(list(THINGS)), rng.choice(list(COLORS)), rng.choice((1, 2)))


def compose(picture: Scene, sprite: Callable[[str], Image.Image], rng: random.Random, side: int = 256) -> Image.Image:
    """Draw the picture, RGB, `side` pixels square, at places, sizes and tilts taken from `rng`."""
    canvas = Image.new("RGB", (side, side), _background(picture.background, rng))
    art = sprite(picture.thing)
    for x, y, size in _places(picture.count, rng):
        placed = _placed(art, round(size * side), rng.uniform(-18, 18), rng.random() < 0.5)
        canvas.paste(placed, (round(x * side - placed.width / 2), round(y * side - placed.height / 2)), placed)
    return canvas


def _background(color: str, rng: random.Random) -> tuple[int, int, int]:
    shift = rng.randint(-10, 10)
    red, green, blue = (max(0, min(255, part + shift + rng.randint(-7, 7))) for part in COLORS[color])
    return red, green, blue


def _places(count: int, rng: random.Random) -> list[tuple[float, float, float]]:
    """Centre and size of each thing as parts of the side: whole inside, and two never overlap."""
    if count == 1:
        size = rng.uniform(0.5, 0.78)
        edge = size / 2 + 0.02
        return [(rng.uniform(edge, 1 - edge), rng.uniform(edge, 1 - edge), size)]
    size = rng.uniform(0.38, 0.46)
    edge = size / 2 + 0.02
    while True:
        (ax, ay), (bx, by) = ((rng.uniform(edge, 1 - edge), rng.uniform(edge, 1 - edge)) for _ in "ab")
        if max(abs(ax - bx), abs(ay - by)) > size:
            return [(ax, ay, size), (bx, by, size)]


def _placed(art: Image.Image, size: int, tilt: float, mirrored: bool) -> Image.Image:
    """The sprite scaled so that its longer side is `size`, then tilted by degrees, perhaps mirrored."""
    scale = size / max(art.size)
    art = art.resize(
        (max(1, math.ceil(art.width * scale)), max(1, math.ceil(art.height * scale))), Image.Resampling.BICUBIC
    )
    if mirrored:
        art = art.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return art.rotate(tilt, Image.Resampling.BICUBIC, expand=True)
