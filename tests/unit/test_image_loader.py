"""Which pictures the engine is told to expect."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from PIL.Image import Image

from config.settings import Settings
from tests.support.pictures import data_uri, png
from worker.engine.row import Picture
from worker.images.loader import ImageLoader


class Expecting:
    """Counts rows that are expected, now and in all."""

    def __init__(self) -> None:
        self.now = self.total = 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        self.now += 1
        self.total += 1
        yield
        self.now -= 1


@pytest.mark.parametrize(("large_bytes", "expected"), [(10, 1), (10**6, 0)])
def test_a_row_is_expected_while_a_large_file_is_decoded(
    large_bytes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.images.loader.LARGE_BYTES", large_bytes)
    expecting, meanwhile = Expecting(), []

    def scaled(image: Image) -> Picture:
        meanwhile.append(expecting.now)
        return Picture(image.tobytes(), None)

    ImageLoader(Settings(), scaled, expecting).load([data_uri(png())])
    assert (meanwhile, expecting.now, expecting.total) == ([expected], 0, expected)
