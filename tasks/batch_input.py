"""Checks a batch's input: its encoding, and whether it is lines of JSON at all. Pure.

A bad line fails alone. In a file of another kind all lines would fail, so it is refused before anything is sent.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterable, Iterator
from itertools import chain

from .errors import IdeficsError


class NotJsonLines(IdeficsError, ValueError):
    """The input is not JSONL: write one JSON object a line."""

    code = "not_json_lines"
    http_status = 422


_LINE = '{"custom_id": "r1", "task": "caption", "arguments": {"image": "https://..."}}'
_UNPACK, _PIPE = "unpack it first", "FILE | idefics-jobs batch - OUTPUT"
_SEND = "send it with idefics-jobs submit caption image=@FILE"
#: How files of other kinds begin, what they are, and the cure.
_CONVERT = f"write each of its rows as a line: {_LINE}"
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"PAR1", "a Parquet file", _CONVERT),
    (b"ARROW1", "an Arrow (Feather) file", _CONVERT),
    (b"Obj\x01", "an Avro file", _CONVERT),
    (b"SQLite format 3\0", "an SQLite database", _CONVERT),
    (b"\xd0\xcf\x11\xe0", "an Excel or other Office file", _CONVERT),
    (b"PK\x03\x04", "a zip or Excel file", f"unpack it, or {_CONVERT}"),
    (b"\x1f\x8b", "compressed with gzip", f"{_UNPACK}: gunzip -c {_PIPE}"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", f"{_UNPACK}: zstdcat {_PIPE}"),
    *((b"BZh%d1AY" % level, "compressed with bzip2", f"{_UNPACK}: bzcat {_PIPE}") for level in range(1, 10)),
    (b"\xfd7zXZ\0", "compressed with xz", f"{_UNPACK}: xzcat {_PIPE}"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    *((magic, "a picture", _SEND) for magic in (b"\x89PNG", b"\xff\xd8\xff", b"GIF8")),
    (b"%PDF-", "a PDF", "only pictures are read"),
)

#: Encodings by their byte order marks. UTF-32's mark begins with UTF-16's.
_MARKS: tuple[tuple[bytes, str], ...] = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
#: Encodings by the first bytes of an object, without a mark.
_UNMARKED: tuple[tuple[bytes, str], ...] = (
    (b"{\0\0\0", "utf-32-le"),
    (b"\0\0\0{", "utf-32-be"),
    (b"{\0", "utf-16-le"),
    (b"\0{", "utf-16-be"),
)
_BOM = "\ufeff"
_DELIMITERS = {",": "a CSV file", "\t": "a TSV file", ";": "a CSV file", "|": "a table"}
#: Characters that a column's name never has.
_NO_COLUMN = frozenset("{}[]:")
_URLS = ("http://", "https://", "data:image/")
_PAGES = ("<!doctype", "<html", "<?xml")
#: Blank lines that may precede the first line.
_MOST_BLANK = 100


def json_lines(pieces: Iterable[str | bytes]) -> Iterator[str | bytes]:
    """The lines of a batch; bytes become UTF-8 without a byte order mark. Blank lines stay, so the numbers are kept.

    Reads the first lines at once. Raises NotJsonLines for input that is clearly something else.
    """
    source = iter(pieces)
    first = next(source, None)
    if first is None:
        return iter(())
    if isinstance(first, bytes):
        _refuse_binary(first)
    lines = _decoded(chain([first], source))
    head = list(_until_sure(lines))
    _refuse_text([_text(line) for line in head if line.strip()])
    return chain(head, lines)


def _decoded(pieces: Iterator[str | bytes]) -> Iterator[str | bytes]:
    first = next(pieces)
    if isinstance(first, str):
        yield first.removeprefix(_BOM)
    elif encoding := _encoding(first):
        yield from _lines(chain([first], pieces), encoding)
        return
    else:
        yield first.removeprefix(codecs.BOM_UTF8)
    yield from pieces


def _encoding(first: bytes) -> str | None:
    """The encoding if it is not UTF-8, else None."""
    return next((name for mark, name in (*_MARKS, *_UNMARKED) if first.startswith(mark)), None)


def _lines(pieces: Iterator[str | bytes], encoding: str) -> Iterator[bytes]:
    # Splitting at newline bytes may have split characters.
    decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
    rest = ""
    for piece in pieces:
        text = decoder.decode(piece) if isinstance(piece, bytes) else piece
        *whole, rest = (rest + text).split("\n")
        for line in whole:
            yield f"{line}\n".encode(errors="replace")
    rest += decoder.decode(b"", final=True)
    if rest:
        yield rest.encode(errors="replace")


def _until_sure(lines: Iterator[str | bytes]) -> Iterator[str | bytes]:
    """The first lines that suffice to recognize the format: one that begins an object, or two."""
    found = 0
    for line, _ in zip(lines, range(_MOST_BLANK), strict=False):
        yield line
        text = _text(line).strip()
        found += bool(text)
        if found == 2 or (text.startswith("{") and len(text) > 1):
            return


def _text(line: str | bytes) -> str:
    return line if isinstance(line, str) else line.decode(errors="replace")


def _refuse_binary(first: bytes) -> None:
    for magic, kind, cure in _MAGIC:
        if first.startswith(magic):
            raise NotJsonLines(f"The input is {kind}, not JSONL: {cure}.")
    if first[8:12] == b"WEBP" and first.startswith(b"RIFF"):
        raise NotJsonLines(f"The input is a picture, not JSONL: {_SEND}.")


def _refuse_text(head: list[str]) -> None:
    """`head`: its first lines that are not blank."""
    first, second = ([line.strip() for line in head] + ["", ""])[:2]
    if second.startswith("{") and first != "[":
        # One bad line before good ones.
        return
    if first == "[" or (first == "{" and second.startswith('"')):
        raise NotJsonLines(
            "The input is one JSON document over several lines, not JSONL: write each object on its own line "
            "(jq -c '.[]' FILE, or jq -c . FILE)."
        )
    if first[:9].lower().startswith(_PAGES):
        raise NotJsonLines(f"The input is a web page or XML, not JSONL: write one object a line: {_LINE}.")
    if _is_url(first) and " " not in first and (not second or _is_url(second)):
        raise NotJsonLines(f"The input is a list of URLs, not JSONL: write each as a line: {_LINE}.")
    if kind := _table(head[:2]):
        raise NotJsonLines(f"The input is {kind}, not JSONL: {_CONVERT}.")


def _is_url(line: str) -> bool:
    return line.lstrip('"')[:11].lower().startswith(_URLS)


def _is_column(name: str) -> bool:
    return 0 < len(name) <= 100 and _NO_COLUMN.isdisjoint(name)


def _table(head: list[str]) -> str | None:
    """What kind of table two lines begin: the names of columns, and a row with as many fields."""
    if len(head) < 2:
        return None
    first, second = (line.strip("\r\n") for line in head)
    if first.strip('"').isidentifier() and _is_url(second):
        return "a CSV file"
    for delimiter, kind in _DELIMITERS.items():
        columns, row = (next(csv.reader([line], delimiter=delimiter), []) for line in (first, second))
        if 1 < len(columns) == len(row) and all(map(_is_column, columns)):
            return kind
    return None
