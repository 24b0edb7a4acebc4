"""JPEGs without their end: opened if all pixels are there, and refused if not."""

from __future__ import annotations

import random
import re
from contextlib import suppress
from typing import Any
from unittest.mock import Mock

import pytest
from PIL import Image

from tasks.errors import ImageInvalid
from tests.support.decoding import difference
from tests.support.pictures import encoded
from worker.images.decode import open_image

JPEGS: list[dict[str, Any]] = [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 1}]


def noise(size: tuple[int, int]) -> Image.Image:
    """The same for every run, unlike Pillow's own."""
    return Image.frombytes("RGB", size, random.Random(0).randbytes(3 * size[0] * size[1]))


@pytest.mark.parametrize("options", JPEGS)
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("lost", [1, 2])
@pytest.mark.parametrize("behind", [b"", bytes(100), b"junk" * 999])
def test_a_jpeg_without_its_last_marker_is_opened(options: dict[str, Any], mode: str, lost: int, behind: bytes) -> None:
    data = encoded(noise((203, 151)).convert(mode), "JPEG", **options)
    assert data.endswith(b"\xff\xd9")
    assert difference(open_image(data[:-lost] + (behind if lost == 2 else b"")), open_image(data)) == 0


@pytest.mark.parametrize("options", JPEGS)
def test_a_jpeg_that_lacks_pixels_is_refused(options: dict[str, Any]) -> None:
    data = encoded(noise((203, 151)), "JPEG", **options)
    half_bytes = [at for at in range(20, 6_000) if data[-at - 1 :][:2] == b"\xff\0"]
    assert half_bytes
    for lost in (*range(20, 40), 200, 2_000, *half_bytes):
        with pytest.raises(ImageInvalid, match="before its last pixels"):
            open_image(data[:-lost])


@pytest.mark.parametrize("options", JPEGS)
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_jpeg_that_lacks_many_rows_is_refused(options: dict[str, Any], part: float) -> None:
    data = encoded(noise((1_200, 900)), "JPEG", **options)
    with pytest.raises(ImageInvalid, match="before its last pixels"):
        open_image(data[: int(len(data) * part)])


def test_a_jpeg_that_ends_at_a_restart_marker_is_refused() -> None:
    data = encoded(noise((203, 151)), "JPEG", restart_marker_blocks=1)
    restarts = [match.start() for match in re.finditer(rb"\xff[\xd0-\xd7]", data)]
    for at in restarts[-9:]:
        with pytest.raises(ImageInvalid, match="before its last pixels"):
            open_image(data[:at])


@pytest.mark.parametrize("options", JPEGS)
def test_a_jpeg_without_its_end_is_decoded_twice_at_most(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, opened = encoded(noise((1_200, 900)), "JPEG", **options), Mock(wraps=Image.open)
    monkeypatch.setattr(Image, "open", opened)
    for cut, decodings in ((data, 1), (data[:-2], 2), (data[:-9_000], 2), (data[: len(data) // 2], 2)):
        opened.reset_mock()
        with suppress(ImageInvalid):
            open_image(cut)
        assert opened.call_count == decodings
