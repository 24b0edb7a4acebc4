"""Tables in other places than local files: compressed, at a URL, in a bucket."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet

from tasks.campaign.tables import Row, TableError, open_table, open_writer
from tests.support.pictures import png
from tests.support.s3 import s3
from tests.support.web import Quiet, serving

ROWS: list[Row] = [{"a": str(number), "b": "ß\n," * 3} for number in range(2_000)]


class Files(Quiet, SimpleHTTPRequestHandler):
    pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    with serving(partial(Files, directory=str(tmp_path))) as port:
        yield f"http://127.0.0.1:{port}"


def written(path: str) -> None:
    with open_writer(path, ["a", "b"]) as out:
        for row in ROWS:
            out.write(row)


@pytest.mark.parametrize("name", ["t.csv.gz", "t.tsv.zst", "t.jsonl.bz2", "t.jsonl.xz", "t.ndjson.zst"])
def test_compressed_by_suffix(name: str, tmp_path: Path) -> None:
    path = str(tmp_path / name)
    written(path)
    assert Path(path).stat().st_size < 50_000
    table = open_table(path)
    assert list(table) == ROWS == list(table)


@pytest.mark.parametrize("name", ["t.csv.gz", "t.jsonl.zst"])
def test_a_broken_compression_is_told(name: str, tmp_path: Path) -> None:
    written(str(tmp_path / name))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(TableError, match=f"Cannot read .*{name}"):
        list(open_table(str(tmp_path / name)))
    (tmp_path / name).write_bytes(b"a,b\n1,2\n")
    with pytest.raises(TableError, match=f"Cannot read .*{name}"):
        open_table(str(tmp_path / name))


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl.gz", "t.parquet"])
def test_a_url_of_fsspec_is_read_and_written(name: str) -> None:
    path = f"memory://tables/{name}"
    written(path)
    table = open_table(path)
    assert list(table) == ROWS == list(table)
    fsspec.filesystem("memory").rm("/tables", recursive=True)
    with pytest.raises(TableError, match="There is no file memory://"):
        open_table(path)


def test_tables_on_a_web_server(tmp_path: Path, web: str) -> None:
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"url,name\nhttps://example.com/a.jpg,x\n"))
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t.parquet")
    assert list(open_table(f"{web}/t.csv.gz?token=a.b")) == [{"url": "https://example.com/a.jpg", "name": "x"}]
    assert list(open_table(f"{web}/t.parquet")) == ROWS
    with pytest.raises(TableError, match=r"There is no file http.*/none\.csv"):
        open_table(f"{web}/none.csv")
    with pytest.raises(TableError, match="Cannot write http"):
        written(f"{web}/out.csv")


def test_tables_and_pictures_in_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3(monkeypatch) as bucket:
        for name in ("t.csv.gz", "t.parquet"):
            written(f"{bucket}/out/{name}")
            assert list(open_table(f"{bucket}/out/{name}")) == ROWS
        fsspec.filesystem("s3").pipe({f"{bucket}/pictures/{name}": png() for name in ("b/1.png", "a/2.png", "x.txt")})
        rows = list(open_table(f"{bucket}/pictures"))
        assert rows == [{"file": "a/2.png", "folder": "a"}, {"file": "b/1.png", "folder": "b"}]
        assert rows[0]["file"].read() == png()  # type: ignore[index]
        with pytest.raises(TableError, match="There is no file s3://"):
            open_table(f"{bucket}/none.csv")
        with pytest.raises(TableError, match="Cannot write s3://other"):
            written("s3://other-bucket/t.csv")


@pytest.mark.parametrize(("url", "told"), [("foo://x/a.csv", "Protocol not known: foo"), ("gs://x/a.csv", "gcsfs")])
def test_a_place_that_cannot_be_opened_is_told(url: str, told: str) -> None:
    with pytest.raises(TableError, match=told):
        open_table(url)
