"""The sprites that pictures are composed from: fetched with npm, drawn once, never committed."""

import importlib
import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from PIL import Image

from worker.demo.world import STYLES, THINGS

#: Everything that training downloads or writes on the way.
WORK = Path(__file__).parents[1] / ".train"

#: The npm package that holds each style. Their licence files were read; see README.md.
PACKAGES = {
    "noto": "@iconify-json/noto",
    "twemoji": "@iconify-json/twemoji",
    "fluent": "@lobehub/fluent-emoji-3d",
    "openmoji": "@iconify-json/openmoji",
}

#: Side of a sprite in pixels, so large that no picture needs to enlarge it.
SPRITE_SIDE = 256


def sprite(style: str, thing: str) -> Image.Image:
    """The thing in this style as RGBA, cropped to what is drawn."""
    path = WORK / "sprites" / style / f"{thing}.png"
    return Image.open(path).convert("RGBA")


def prepare() -> None:
    """Fetch each package and draw its sprites, unless that was done before."""
    for style in STYLES:
        folder = WORK / "sprites" / style
        if (folder / "done").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for thing, image in _drawn(style):
            image.crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()).save(folder / f"{thing}.png")
        (folder / "done").touch()


def _drawn(style: str) -> Iterator[tuple[str, Image.Image]]:
    package = _tarball(PACKAGES[style])
    for name, thing in THINGS.items():
        yield name, _webp(package, thing.code) if style == "fluent" else _svg(package, thing.code)


def _tarball(package: str) -> Path:
    folder = WORK / "art"
    folder.mkdir(parents=True, exist_ok=True)
    stem = package.removeprefix("@").replace("/", "-")
    if not (found := sorted(folder.glob(f"{stem}-[0-9]*.tgz"))):
        subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, check=True)
        found = sorted(folder.glob(f"{stem}-[0-9]*.tgz"))
    return found[-1]


def _webp(package: Path, code: str) -> Image.Image:
    for spelling in (code, f"{code}-fe0f"):
        if f"package/assets/{spelling}.webp" in _names(package):
            return Image.open(io.BytesIO(_read(package, f"package/assets/{spelling}.webp"))).convert("RGBA")
    raise LookupError(f"{package.name} has no picture for {code}: choose another thing in vocabulary.json")


def _svg(package: Path, code: str) -> Image.Image:
    # Only training draws, and this has no types.
    resvg_py = importlib.import_module("resvg_py")
    icons = json.loads(_read(package, "package/icons.json"))
    chars = json.loads(_read(package, "package/chars.json"))
    name = chars.get(code) or chars[f"{code}-fe0f"]
    while name in icons.get("aliases", {}):
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    drawn = resvg_py.svg_to_bytes(svg_string=svg, width=SPRITE_SIDE, height=SPRITE_SIDE)
    return Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")


@cache
def _names(package: Path) -> frozenset[str]:
    with tarfile.open(package) as tar:
        return frozenset(tar.getnames())


@cache
def _read(package: Path, member: str) -> bytes:
    with tarfile.open(package) as tar:
        file = tar.extractfile(member)
        assert file is not None, f"{member} is not a file"
        return file.read()
