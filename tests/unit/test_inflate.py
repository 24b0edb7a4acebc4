"""Compressed bodies, and bodies that grow a thousandfold."""

from __future__ import annotations

import base64
import bz2
import lzma
import tracemalloc
import zlib
from typing import Any

import pytest

from worker.inflate import inflated

BODY = b'[[], {"prompt": ["Hello"]}, {}]'


def message(compression: str | None, body: bytes, encoding: str | None = "base64") -> dict[str, Any]:
    headers = {"id": "a", **({"compression": compression} if compression else {})}
    text = base64.b64encode(body).decode() if encoding == "base64" else body.decode("latin-1")
    return {"body": text, "headers": headers, "properties": {"body_encoding": encoding}}


@pytest.mark.parametrize(
    ("compression", "body"),
    [("application/x-gzip", zlib.compress(BODY)), ("zlib", zlib.compress(BODY)), ("bzip2", bz2.compress(BODY))],
)
def test_a_compressed_body_is_inflated(compression: str, body: bytes) -> None:
    plain = inflated(message(compression, body), 100)
    assert plain["body"] == BODY
    assert plain["headers"] == {"id": "a"}
    assert plain["properties"]["body_encoding"] is None


def test_a_message_that_is_not_compressed_stays_as_it_is() -> None:
    for plain in (message(None, BODY), {**message(None, BODY), "headers": None}):
        assert inflated(plain, 10) is plain


@pytest.mark.parametrize(
    ("compression", "body"), [("gzip", zlib.compress(bytes(2**26))), ("bzip2", bz2.compress(bytes(2**26)))]
)
def test_a_bomb_is_inflated_to_one_byte_more_than_allowed(compression: str, body: bytes) -> None:
    sent = message(compression, body)
    tracemalloc.start()
    try:
        assert len(inflated(sent, 1_000)["body"]) == 1_001
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("compression", "body", "encoding"),
    [("gzip", b"no zlib", "base64"), ("bzip2", b"no bz2", None), ("xz", lzma.compress(BODY), "base64")],
)
def test_what_cannot_be_inflated_is_left_to_who_reads_json(compression: str, body: bytes, encoding: str | None) -> None:
    plain = inflated(message(compression, body, encoding), 100)
    assert plain["body"] == body
    assert "compression" not in plain["headers"]
