"""Large pictures, memory, threads and mutated files."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps, UnidentifiedImageError, features

from tasks.errors import ImageInvalid, ImageTooLarge, JobError, OutOfMemory
from tests.support.decoding import RED, SIZE, WHITE, _turned, difference, picture
from tests.support.pictures import encoded
from worker.images.decode import DEFAULT_LIMITS, ImageLimits, open_image

# Phones, panoramas, AVIF


@pytest.mark.parametrize("size", [(8_160, 6_144), (16_382, 3_628), (40_000, 1_500)])
def test_pictures_of_phones_and_panoramas_are_opened_by_default(size: tuple[int, int]) -> None:
    data = encoded(Image.linear_gradient("L").resize(size), "JPEG")
    opened = open_image(data)
    assert opened.size == ((size[0] + 1) // 2, (size[1] + 1) // 2)
    expected = Image.linear_gradient("L").resize(opened.size).convert("RGB")
    assert difference(opened.resize((50, 50)), expected.resize((50, 50))) <= 3
    assert open_image(encoded(Image.new("1", size), "PNG")).size == size


def test_up_to_forty_megapixels_a_jpeg_is_decoded_in_full() -> None:
    assert open_image(encoded(Image.new("L", (8_000, 5_000)), "JPEG")).size == (8_000, 5_000)
    assert open_image(encoded(Image.new("L", (8_000, 5_001)), "JPEG")).size == (4_000, 2_501)


def test_more_pixels_are_the_operators_to_allow() -> None:
    data = encoded(Image.new("L", (13_300, 13_300)), "JPEG")
    with pytest.raises(ImageTooLarge, match="64,000,000"):
        open_image(data)
    assert open_image(data, ImageLimits(max_pixels=178_000_000)).size == (3_325, 3_325)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow opens no AVIF")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif_is_opened_upright(orientation: int) -> None:
    clear = picture()
    clear.putalpha(Image.radial_gradient("L").resize(SIZE))
    for image in (picture(), clear, picture().convert("L")):
        data = encoded(image, "AVIF", exif=_turned(orientation), quality=95)
        with Image.open(io.BytesIO(data)) as plain:
            turned = ImageOps.exif_transpose(plain).convert("RGBA")
        white = Image.new("RGBA", turned.size, WHITE)
        expected = Image.alpha_composite(white, turned).convert("RGB")
        assert difference(open_image(data), expected) == 0


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow opens no AVIF")
def test_avif_keeps_the_limits_and_never_reads_exif(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(), "AVIF", exif=_turned(6))
    monkeypatch.setattr(Image.Exif, "load", _raise(AssertionError()))
    assert open_image(data).size == SIZE[::-1]
    with pytest.raises(ImageTooLarge):
        open_image(data, ImageLimits(max_pixels=100))
    for broken in (data[:-500], data[:40], data[:200] + bytes(len(data) - 200)):
        with pytest.raises(ImageInvalid):
            open_image(broken)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "film"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- a --><svg/>', "SVG"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"II*\0\x08\0\0\0", "TIFF"),
        (b"MM\0*\0\0\0\x08", "TIFF"),
        (b"BM\x36\0\0\0\0\0\0\0\x36\0", "BMP"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"%PDF-1.7", "PDF"),
    ],
)
def test_another_form_is_named(data: bytes, name: str) -> None:
    with pytest.raises(ImageInvalid, match=f"{name}.*: send JPEG, PNG, WebP, GIF or AVIF"):
        open_image(data + bytes(50))


# Memory


_LARGE = (8_000, 5_000)


def _flat(mode: str, colour: Any) -> Image.Image:
    return Image.new(mode, _LARGE, colour)


_LARGE_FILES: dict[str, Callable[[], bytes]] = {
    "palette": lambda: encoded(_flat("P", 1), "PNG", transparency=bytes([255, 128, 0])),
    "palette, one clear colour": lambda: encoded(_flat("P", 1), "GIF", transparency=0),
    "alpha": lambda: encoded(_flat("RGBA", (*RED, 9)), "PNG", compress_level=1),
    "grey and alpha": lambda: encoded(_flat("LA", (9, 9)), "PNG", compress_level=1),
    "one clear colour": lambda: encoded(_flat("RGB", RED), "PNG", compress_level=1, transparency=RED),
    "sixteen bits": lambda: encoded(_flat("I;16", 9), "PNG", compress_level=1, transparency=9),
    "upright": lambda: encoded(_flat("RGB", RED), "JPEG", exif=_turned(6)),
    "CMYK": lambda: encoded(_flat("CMYK", (0, 9, 9, 0)), "JPEG", exif=_turned(6)),
    "fifty megapixels": lambda: encoded(Image.new("RGB", (8_160, 6_144), RED), "JPEG", exif=_turned(6)),
    "no end": lambda: encoded(_flat("L", 9), "JPEG")[:-2],
}


@pytest.mark.parametrize("kind", _LARGE_FILES)
def test_a_picture_at_the_limit_takes_little_more_than_its_pixels(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(_LARGE_FILES[kind]())
    code = """if True:
        import resource, sys
        from worker.images.decode import open_image
        data = open(sys.argv[1], "rb").read()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        image = open_image(data)
        print(4 * image.width * image.height, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], capture_output=True, check=True)
    decoded, peak = map(int, run.stdout.split())
    assert peak < decoded + 250_000_000


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "I;16", "CMYK"])
def test_in_strips_every_pixel_is_what_it_was(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.linear_gradient("L").convert("I;16") if mode == "I;16" else picture((301, 203)).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.radial_gradient("L").resize(image.size))
    data = encoded(image, "JPEG" if mode == "CMYK" else "PNG", exif=_turned(7))
    whole = open_image(data)
    monkeypatch.setattr("worker.images.decode.STRIP_PIXELS", 1_000)
    assert difference(open_image(data), whole) == 0


def test_too_little_memory_is_no_fault_of_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(), "PNG")
    monkeypatch.setattr(Image.Image, "convert", _raise(MemoryError()))
    with pytest.raises(OutOfMemory):
        open_image(data)


@pytest.mark.parametrize(
    "error",
    [
        OSError("x"),
        SyntaxError("x"),
        ValueError("x"),
        EOFError("x"),
        struct.error("x"),
        zlib.error("x"),
        TypeError("x"),
        IndexError("x"),
        KeyError("x"),
        OverflowError("x"),
        ZeroDivisionError("x"),
        UnidentifiedImageError("x"),
    ],
)
def test_every_error_of_a_decoder_is_mapped(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "convert", _raise(error))
    with pytest.raises(ImageInvalid) as refusal:
        open_image(encoded(Image.new("RGB", SIZE), "PNG"))
    assert refusal.value.args[0] == "image_invalid"


def test_a_time_limit_is_no_decoders_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class SoftTimeLimit(Exception):
        pass

    monkeypatch.setattr(Image.Image, "convert", _raise(SoftTimeLimit()))
    with pytest.raises(SoftTimeLimit):
        open_image(encoded(Image.new("RGB", SIZE), "PNG"))


def _raise(error: Exception) -> Callable[..., None]:
    def act(*_: object, **__: object) -> None:
        raise error

    return act


# Mutations


def _mutated(data: bytes, chance: random.Random) -> bytes:
    mutant = bytearray(data)
    for _ in range(chance.choice((1, 2, 8))):
        at = chance.randrange(len(mutant))
        match chance.randrange(4):
            case 0:
                mutant[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
            case 1:
                del mutant[at : at + chance.randrange(1, 20)]
            case 2:
                mutant[at:at] = chance.randbytes(chance.randrange(1, 20))
            case 3:
                mutant[at : at + 4] = struct.pack(">I", chance.choice((0, 1, 2**16, 2**31, 2**32 - 1)))
        if not mutant:
            return b""
    return bytes(mutant)


def _seeds() -> list[bytes]:
    clear = picture()
    clear.putalpha(Image.radial_gradient("L").resize(SIZE))
    frames = [picture(), Image.new("RGB", SIZE)]
    many = {"save_all": True, "append_images": frames[1:]}
    return [
        encoded(picture(), "JPEG", exif=_turned(6)),
        encoded(picture(), "JPEG", progressive=True),
        encoded(picture().convert("CMYK"), "JPEG"),
        encoded(picture(), "MPO", **many),
        encoded(clear, "PNG", exif=_turned(8), icc_profile=b"profile" * 9),
        encoded(picture().quantize(16), "PNG", transparency=3),
        encoded(Image.new("I;16", SIZE, 999), "PNG"),
        encoded(frames[0], "PNG", **many),
        encoded(frames[0], "GIF", **many, comment=b"hello"),
        encoded(clear, "GIF"),
        encoded(picture(), "WEBP", exif=_turned(3)),
        encoded(clear, "WEBP", lossless=True),
        encoded(frames[0], "WEBP", **many),
    ]


@pytest.mark.filterwarnings("ignore")
def test_five_hundred_mutants_open_or_end_in_an_error_of_ours() -> None:
    chance = random.Random(7)
    seeds = _seeds()
    limits = replace(DEFAULT_LIMITS, max_pixels=1_000_000)
    opened = 0
    for number in range(500):
        with suppress(ImageInvalid, ImageTooLarge):
            image = open_image(_mutated(seeds[number % len(seeds)], chance), limits)
            assert image.mode == "RGB", number
            assert image.width * image.height <= limits.max_pixels, number
            opened += 1
    assert 50 < opened < 450


def test_many_threads_open_pictures_at_once() -> None:
    data = [encoded(picture(), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF")] * 16
    with ThreadPoolExecutor(8) as threads:
        assert {image.size for image in threads.map(open_image, data)} == {SIZE}


def test_a_failures_detail_says_what_it_was() -> None:
    good = io.BytesIO()
    Image.new("RGB", (64, 64)).save(good, "PNG")
    for data, limits, detail in [
        (b"<!doctype html><title>Log in</title>", DEFAULT_LIMITS, "not_a_picture"),
        (good.getvalue()[:60], DEFAULT_LIMITS, "decode"),
        (good.getvalue(), ImageLimits(max_pixels=10), "pixels"),
        (good.getvalue(), ImageLimits(max_edge=10), "edge"),
        (good.getvalue(), ImageLimits(max_ratio=0.5), "ratio"),
    ]:
        with pytest.raises(JobError) as failure:
            open_image(data, limits)
        assert failure.value.detail == detail
