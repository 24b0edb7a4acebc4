"""Compressed bodies, and bodies that grow a thousandfold."""

from __future__ import annotations

import bz2
import lzma
import zlib
from typing import Any

import pytest

from tests.support.memory import peak_memory
from worker.queue.decompression import inflated

BODY = b'[[], {"prompt": ["Hello"]}, {}]'


@pytest.mark.parametrize(
    ("compression", "body"),
    [("application/x-gzip", zlib.compress(BODY)), ("zlib", zlib.compress(BODY)), ("bzip2", bz2.compress(BODY))],
)
def test_a_compressed_body_is_inflated(compression: str, body: bytes) -> None:
    assert inflated(body, compression, 100) == BODY


@pytest.mark.parametrize(
    ("compression", "body"), [("gzip", zlib.compress(bytes(2**26))), ("bzip2", bz2.compress(bytes(2**26)))]
)
def test_a_bomb_is_inflated_no_further_than_allowed(compression: str, body: bytes) -> None:
    def inflate() -> None:
        assert len(inflated(body, compression, 1_001)) == 1_001

    assert peak_memory(inflate, expected_below=2**20) < 2**20


@pytest.mark.parametrize(
    ("compression", "body", "cure"),
    [
        ("gzip", b"no zlib", "compress it so"),
        ("bzip2", b"no bz2", "compress it so"),
        ("xz", lzma.compress(BODY), "task_compression"),
        (["gzip"], zlib.compress(BODY), "task_compression"),
    ],
)
def test_what_cannot_be_inflated_is_refused_with_the_cure(compression: Any, body: bytes, cure: str) -> None:
    with pytest.raises(ValueError, match=cure):
        inflated(body, compression, 100)
