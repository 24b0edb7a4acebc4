"""What people give `batch`: lines of JSON in several encodings, and files of other kinds."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tasks import IdeficsError, batch, cli
from tasks.batch_input import NotJsonLines, json_lines
from tasks.cli import connection
from tasks.testing import FakeClient

TEXTS = ["a cat", "Größe ✓", "ਊ \u0a0a 猫", "\U0001f408"]
LINES = [json.dumps({"custom_id": str(n), "text": text}, ensure_ascii=False) for n, text in enumerate(TEXTS)]
CSV = b"image,prompt\nhttps://example.com/a.jpg,What is it?\n"


def read(content: bytes) -> list[Any]:
    return [json.loads(line) for line in json_lines(io.BytesIO(content)) if line.strip()]


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["", "\n"])
def test_lines_are_read_in_every_unicode_encoding(encoding: str, newline: str, end: str) -> None:
    content = newline.join(LINES) + (newline if end else "")
    assert read(content.encode(encoding)) == list(map(json.loads, LINES))


def test_big_endian_with_a_mark_is_read() -> None:
    assert read(codecs.BOM_UTF16_BE + "\n".join(LINES).encode("utf-16-be")) == list(map(json.loads, LINES))


def test_lines_of_text_may_begin_with_a_mark() -> None:
    assert list(json_lines(["\ufeff{}", "[]"])) == ["{}", "[]"]


def test_each_line_stays_one_so_that_its_number_is_the_files() -> None:
    content = b"\n\n{\n\n{}\n[]\nno json\n\n"
    assert list(json_lines(io.BytesIO(content))) == content.splitlines(keepends=True)
    assert list(json_lines([])) == []


OTHERS: dict[str, bytes] = {
    "CSV": CSV,
    "CSV file": b"\xef\xbb\xbf" + CSV,
    "a CSV": CSV.decode().encode("utf-16"),
    "CSV ": CSV.replace(b",", b";"),
    "TSV": CSV.replace(b",", b"\t"),
    "CSV  ": b'"id","image"\n"1","https://example.com/a.jpg"\n',
    "CSV   ": b"image\nhttps://example.com/a.jpg\n",
    "URLs": b"https://example.com/a.jpg\nhttps://example.com/b.jpg\n",
    "Parquet": b"PAR1\x15\x04\x15",
    "Arrow": b"ARROW1\0\0",
    "Excel": b"PK\x03\x04\x14\0",
    "Office": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
    "bzip2": bz2.compress(b"{}\n"),
    "xz": lzma.compress(b"{}\n"),
    "gzip": gzip.compress(b"{}\n"),
    "zstd": b"\x28\xb5\x2f\xfd\x04",
    "SQLite": b"SQLite format 3\0",
    "picture": b"\x89PNG\r\n\x1a\n",
    "jq -c": json.dumps([{"custom_id": "1"}], indent=2).encode(),
    "one JSON document": json.dumps({"custom_id": "1", "task": "caption"}, indent=2).encode(),
    "web page": b"<!DOCTYPE html>\n<html>",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_of_another_kind_is_refused_once_in_one_sentence(kind: str) -> None:
    client = FakeClient()
    with pytest.raises(NotJsonLines, match=kind.strip()) as refused:
        list(batch.run(client, io.BytesIO(OTHERS[kind])))
    assert client.submitted == []
    assert isinstance(refused.value, IdeficsError)
    told = str(refused.value)
    assert told.endswith(".")
    assert ": " in told
    assert "\n" not in told
    assert "example.com" not in told


@pytest.mark.parametrize("kind", OTHERS)
def test_the_command_refuses_it_before_it_reaches_for_a_broker(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_client(*args: Any, **options: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(connection, "Client", no_client)
    (tmp_path / "in").write_bytes(OTHERS[kind])
    outcome = CliRunner().invoke(cli.main, ["batch", str(tmp_path / "in"), str(tmp_path / "out")])
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert kind.strip() in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"not json, but a line\n{}\n",
        b"not json\n",
        b"a,b\n",
        b'{"custom_id": "1", "task": "caption"}\nimage,prompt\n',
        b'["a", "b"]\n["c", "d"]\n',
        b"{\n{}\n",
        b"oops, no\nmore oops\n",
        b"",
        b"\n",
    ],
)
def test_a_bad_line_fails_no_file(content: bytes) -> None:
    assert b"".join(map(bytes, json_lines(io.BytesIO(content)))) == content  # type: ignore[arg-type]


def test_a_file_in_utf_16_is_answered_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient()
    monkeypatch.setattr(connection, "Client", lambda *args, **options: client)
    lines = [
        json.dumps({"custom_id": f"r{n}", "task": "complete", "arguments": {"prompt": [f"猫{n}"]}}, ensure_ascii=False)
        for n in range(5)
    ]
    (tmp_path / "in").write_bytes("\r\n".join(lines).encode("utf-16"))
    for _ in range(2):
        outcome = CliRunner().invoke(cli.main, ["batch", str(tmp_path / "in"), str(tmp_path / "out")])
        assert outcome.exit_code == 0, outcome.output
        found = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
        assert sorted(one["custom_id"] for one in found) == [f"r{n}" for n in range(5)]
    assert len(client.submitted) == 5


def test_another_encoding_is_named_in_its_line() -> None:
    line = json.dumps({"custom_id": "1", "task": "complete", "arguments": {"prompt": ["Größe"]}}, ensure_ascii=False)
    (answer,) = batch.run(FakeClient(), io.BytesIO(line.encode("latin-1")))
    assert answer["error"]["message"] == "Line 1 is not JSON in UTF-8: save the file as UTF-8."
