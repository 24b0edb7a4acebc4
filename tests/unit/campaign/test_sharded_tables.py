"""Several files as one table: their names and order, their columns, and a campaign over them."""

from __future__ import annotations

import io
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet

from tasks import Complete, Job, campaign
from tasks.campaign import CampaignError, Plan
from tasks.campaign.tables import BadRow, TableError, open_table, open_writer
from tasks.campaign.tables.patterns import is_pattern, matching_files, may_match
from tasks.testing import FakeClient
from tests.support.pictures import png
from tests.support.web import Quiet, serving


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def write_parquet(path: str, **columns: list[Any]) -> None:
    parquet.write_table(pa.table(columns), path)


def column(path: str, name: str) -> list[Any]:
    return [row[name] for row in open_table(path) if not isinstance(row, BadRow)]


@pytest.mark.parametrize(
    ("pattern", "files"),
    [
        ("s/{00..02}.tar", ["s/00.tar", "s/01.tar", "s/02.tar"]),
        ("s/{8..10}.tar", ["s/8.tar", "s/9.tar", "s/10.tar"]),
        ("s/{098..101}.tar", ["s/098.tar", "s/099.tar", "s/100.tar", "s/101.tar"]),
        ("{2..1}", ["2", "1"]),
        ("{val,train}/{0..1}.csv", ["val/0.csv", "val/1.csv", "train/0.csv", "train/1.csv"]),
        ("https://h/{a,b}.csv?x={1..2}", [f"https://h/{name}.csv?x={x}" for name in "ab" for x in (1, 2)]),
        ("a{,b}.csv", ["a.csv", "ab.csv"]),
    ],
)
def test_braces_are_expanded_in_their_order(pattern: str, files: list[str]) -> None:
    assert is_pattern(pattern)
    assert matching_files(pattern) == files


@pytest.mark.parametrize(
    "path", ["a.csv", "{a}.csv", "{a..b}.csv", "https://h/a.csv?q=*", "https://h/a?.csv", "https://h/[1].csv"]
)
def test_other_paths_name_one_file(path: str) -> None:
    assert not is_pattern(path)


def test_a_range_beyond_reason_is_refused() -> None:
    for pattern in ("{0..99999999}.tar", "{0..999}{0..999}.tar"):
        with pytest.raises(TableError, match="more than 100,000 files"):
            matching_files(pattern)


def test_files_of_a_wildcard_come_by_name_and_no_file_is_an_error() -> None:
    for number in (10, 2, 1):
        write(f"part-{number:02}.csv", f"a\n{number}\n")
    write("deep/er/part-03.csv", "a\n3\n")
    assert column("part-*.csv", "a") == ["1", "2", "10"]
    assert column("part-[01][02].csv", "a") == ["2", "10"]
    assert column("**/part-*.csv", "a") == ["3", "1", "2", "10"]
    with pytest.raises(TableError, match=r"There is no file other-\*\.csv"):
        open_table("other-*.csv")


def test_a_file_with_such_letters_in_its_name_is_itself() -> None:
    write("a[1]{x,y}*.csv", "a\n1\n")
    write("a1x.csv", "a\n2\n")
    assert column("a[1]{x,y}*.csv", "a") == ["1"]


def test_rows_that_cannot_be_read_and_notes_name_their_file() -> None:
    write("1.csv", "a,b\n1,2\n")
    write("2.csv", "b;a\n3;4\n5\n")
    table = open_table("?.csv")
    rows = list(table)
    assert table.columns == ["a", "b"]
    assert rows[:2] == [{"a": "1", "b": "2"}, {"a": "4", "b": "3"}]
    assert isinstance(rows[2], BadRow)
    assert rows[2].reason.startswith("2.csv: Line 3 has 1 fields")
    assert table.notes == ["2.csv: Its columns are separated by ';'."]
    assert table.count is None


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ("a", "2.csv lacks 'b', compared with 1.csv"),
        ("a,b,c", "2.csv has 'c' besides, compared with 1.csv"),
        ("a,c", "2.csv lacks 'b' and has 'c' besides, compared with 1.csv"),
    ],
)
def test_a_file_with_other_columns_is_named_at_once(header: str, told: str) -> None:
    write("1.csv", "a,b\n1,2\n")
    write("2.csv", f"{header}\n")
    with pytest.raises(TableError, match=f"{told}: give all files the same columns"):
        open_table("?.csv")


def test_files_of_several_formats_are_refused() -> None:
    write("1.csv", "a\n1\n")
    write("2.jsonl", '{"a": 1}\n')
    with pytest.raises(TableError, match=r"2\.jsonl is of another format than 1\.csv"):
        open_table("[12].*")


def test_typed_files_have_one_count_and_types_that_hold_all_values() -> None:
    write_parquet("1.parquet", a=[None, None], b=[1, 2])
    write_parquet("2.parquet", a=["x", None], b=[1.5, None])
    table = open_table("{1,2}.parquet")
    assert table.count == 4
    assert [field.type for field in table.schema] == [pa.string(), pa.float64()]
    with open_writer("out.parquet", table.columns, table.schema) as out:
        for row in table:
            assert isinstance(row, dict)
            out.write(row)
    assert parquet.read_table("out.parquet").to_pydict() == {"a": [None, None, "x", None], "b": [1.0, 2.0, 1.5, None]}


def test_a_file_with_other_types_is_named() -> None:
    write_parquet("1.parquet", a=[1])
    write_parquet("2.parquet", a=["x"])
    with pytest.raises(TableError, match=r"2\.parquet has other types than 1\.parquet: give all files the same"):
        open_table("*.parquet")


def test_a_later_jsonl_file_may_have_further_columns() -> None:
    write("1.jsonl", '{"a": 1}\n')
    write("2.jsonl", '{"a": 2, "b": 3}\nbroken\n')
    table = open_table("*.jsonl")
    assert table.columns == ["a"]
    rows = list(table)
    assert rows[:2] == [{"a": 1}, {"a": 2, "b": 3}]
    assert isinstance(rows[2], BadRow)
    assert rows[2].reason.startswith("2.jsonl: Line 2 is not JSON")
    assert table.columns == ["a", "b"]
    assert len(list(table)) == 3


def test_shards_of_a_webdataset_are_one_table_and_a_missing_one_is_told_at_once() -> None:
    for number in range(3):
        with tarfile.open(f"{number:03}.tar", "w") as tar:
            for name, content in ((f"{number}.png", png()), (f"{number}.txt", str(number).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert column("{000..002}.tar", "txt") == ["0", "1", "2"]
    assert column("{000..002}.tar", "image")[2].read() == png()
    with pytest.raises(TableError, match=r"There is no file 003\.tar"):
        open_table("{000..003}.tar")


def test_patterns_at_urls(tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    files.pipe({f"/shards/{name}.csv": f"a\n{name}\n".encode() for name in ("2", "10", "1")})
    assert column("memory://shards/*.csv", "a") == ["1", "10", "2"]
    with pytest.raises(TableError, match=r"There is no file memory://shards/\*\.tsv"):
        open_table("memory://shards/*.tsv")
    files.rm("/shards", recursive=True)
    for name in ("1", "2"):
        write(f"{name}.csv", f"a\n{name}\n")
    with serving(partial(_Files, directory=str(tmp_path))) as port:
        assert column(f"http://127.0.0.1:{port}/{{2,1}}.csv?t=x", "a") == ["2", "1"]
        assert column(f"http://127.0.0.1:{port}/*.csv", "a") == ["1", "2"]
        with pytest.raises(TableError, match=r"There is no file http.*/3\.csv"):
            open_table(f"http://127.0.0.1:{port}/{{1..3}}.csv")


class _Files(Quiet, SimpleHTTPRequestHandler):
    pass


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("/d/*.csv", "/d/out.csv", True),
        ("/d/{a,out}.csv", "/d/out.csv", True),
        ("/d/**/*.csv", "/d/e/out.csv", True),
        ("/d/**/*.csv", "/d/out.csv", True),
        ("/d/*.csv", "/d/e/out.csv", False),
        ("/d/part-*.csv", "/d/out.csv", False),
        ("/d/out.csv", "/d/out.csv", False),
    ],
)
def test_a_pattern_is_known_to_match_a_file_before_that_is_there(pattern: str, path: str, matches: bool) -> None:
    assert may_match(pattern, path) == matches


PLAN = Plan(task="complete", set={"prompt": '["{ask}"]'})


class Client(FakeClient):
    def __init__(self) -> None:
        super().__init__(lambda job: job.prompt[0].text.upper())  # type: ignore[union-attr]
        self.asked: list[str] = []

    def submit(self, job: Job, **options: Any) -> Any:
        assert isinstance(job, Complete)
        self.asked.append(job.prompt[0].text)  # type: ignore[union-attr]
        return super().submit(job, **options)


def test_a_campaign_over_several_files_goes_on_with_what_is_new() -> None:
    write("1.csv", "ask\na\nb\n")
    write("2.csv", "ask\nc\nd\n")
    client, folder = Client(), Path("out")
    folder.mkdir()
    run = partial(campaign.run, client, "[0-9].csv", "out/all.csv", PLAN)
    assert run().done == 4
    assert column("out/all.csv", "text") == ["A", "B", "C", "D"]
    assert run().had_finished
    write("2.csv", "ask\nc\nx\n")
    write("3.csv", "ask\ny\n")
    assert not run().had_finished
    assert client.asked == ["a", "b", "c", "d", "x", "y"]
    assert column("out/all.csv", "text") == ["A", "B", "C", "X", "Y"]


def test_an_output_among_the_inputs_files_is_refused() -> None:
    write("1.csv", "ask\na\n")
    client = Client()
    with pytest.raises(CampaignError, match="OUTPUT would be one of INPUT's files"):
        campaign.run(client, "*.csv", "out.csv", PLAN)
    assert (client.asked, Path("out.csv").exists()) == ([], False)
