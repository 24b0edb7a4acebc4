"""The encoding of a text file, and its lines with a bound on their length."""

from __future__ import annotations

import codecs
import contextlib
import io
from collections.abc import Iterator
from typing import BinaryIO, cast

from ..errors import TableError
from .files import opened

#: Bytes from which an encoding is recognized.
HEAD_BYTES = 1 << 20
#: Characters of a line: more than any job takes.
MAX_CHARS = 32_000_000

#: UTF-32's mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_FALLBACK = "cp1252"
#: Stands for bytes that are nothing in the file's encoding: a lone surrogate, which no text of a file has.
UNREADABLE = "\udcff"
_MARKED = "idefics_jobs.unreadable"
codecs.register_error(_MARKED, lambda error: (UNREADABLE, error.end))  # type: ignore[attr-defined]


def checked_encoding(name: str) -> str:
    """An encoding that a user names. Raises TableError."""
    try:
        codecs.lookup(name)
        "".encode(name)
    except LookupError:
        raise TableError(f"There is no encoding {name!r}: write for example utf-8, cp1252 or shift_jis.") from None
    return name


def recognized(head: bytes, is_all: bool) -> tuple[str, list[str]]:
    """The encoding of a file that begins so, and what the user should know about it."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name, []
    if (of_zeros := _of_zeros(head[:1024])) is not None:
        return of_zeros, [f"It has no byte order mark, and is read as {of_zeros.upper()}."]
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=is_all)
    except UnicodeDecodeError:
        return _FALLBACK, ["It is not UTF-8, and is read as Windows-1252: name another with --encoding."]
    return "utf-8", []


def _of_zeros(head: bytes) -> str | None:
    """UTF-16 without a mark, by the zero bytes of its ASCII characters."""
    even, odd = head[0::2], head[1::2]
    if len(head) < 4 or even.count(0) + odd.count(0) < len(head) * 0.3:
        return None
    if odd.count(0) > even.count(0) * 2:
        return "utf-16-le"
    return "utf-16-be" if even.count(0) > odd.count(0) * 2 else None


def read_head(path: str) -> tuple[bytes, bool]:
    """A file's first bytes, and whether they are all."""
    with opened(path) as file:
        head = _read(file, HEAD_BYTES + 1)
    return head[:HEAD_BYTES], len(head) <= HEAD_BYTES


def _read(file: BinaryIO, count: int) -> bytes:
    pieces = []
    while count > 0 and (piece := file.read(count)):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


@contextlib.contextmanager
def opened_text(path: str, encoding: str, newline: str) -> Iterator[io.TextIOWrapper]:
    """A file's text. Bytes that are nothing in its encoding become lone surrogates, which `is_readable` finds."""
    with opened(path) as file:
        text = io.TextIOWrapper(cast(BinaryIO, _Buffered(file)), encoding, errors=_MARKED, newline=newline)
        try:
            yield text
        finally:
            text.detach()


class _Buffered(io.BufferedReader):
    """A reader for files of fsspec and pyarrow, which may lack what TextIOWrapper needs."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(_Raw(file), 1 << 18)


class _Raw(io.RawIOBase):
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        piece = self._file.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


def lines(text: io.TextIOWrapper) -> Iterator[str]:
    """The lines with their ends; of a longer one than MAX_CHARS its beginning only, without an end."""
    while line := text.readline(MAX_CHARS):
        yield line
        while len(line) == MAX_CHARS and not line.endswith(("\n", "\r")):
            line = text.readline(MAX_CHARS)


def is_readable(text: str) -> bool:
    """Whether all its bytes were characters in the file's encoding."""
    return text.isascii() or UNREADABLE not in text


def repaired(text: str) -> str:
    """The text with a replacement character for what was none."""
    return text if text.isascii() else text.replace(UNREADABLE, "\ufffd")


def chosen_encoding(path: str, encoding: str | None) -> tuple[str, list[str]]:
    """A file's encoding, named or recognized, and what the user should know about it. Raises TableError."""
    return (checked_encoding(encoding), []) if encoding else recognized(*read_head(path))
