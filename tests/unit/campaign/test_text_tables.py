"""CSV, TSV and JSONL, as they come: encodings, delimiters, broken lines; and what is written is read as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.campaign.tables import BadRow, Row, TableError, check_output, csv_records, open_table, open_writer, text
from tests.support.pictures import png

CSV = 'url,name\nhttps://example.com/a.jpg,Größe\nb,"two\nlines, and ""quotes"""\n'
ROWS: list[Row] = [
    {"url": "https://example.com/a.jpg", "name": "Größe"},
    {"url": "b", "name": 'two\nlines, and "quotes"'},
]


def table(path: Path, content: str | bytes, name: str = "t.csv", **options: Any) -> list[Row | BadRow]:
    return list(open_table(saved(path, content, name), **options))


def saved(path: Path, content: str | bytes, name: str = "t.csv") -> str:
    file = path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(file)


# CSV


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_in_every_unicode_encoding(encoding: str, end: str, tmp_path: Path) -> None:
    content = CSV.replace("\n", end).encode(encoding)
    rows = table(tmp_path, content)
    assert [dict(row) for row in rows if isinstance(row, dict)] == [
        {name: value.replace("\n", end) for name, value in row.items()} for row in ROWS
    ]


def test_windows_encoding_is_assumed_and_told(tmp_path: Path) -> None:
    path = saved(tmp_path, CSV.encode("cp1252"))
    found = open_table(path)
    assert list(found) == ROWS
    assert found.notes == ["It is not UTF-8, and is read as Windows-1252: name another with --encoding."]
    assert open_table(path, encoding="latin-1").notes == []
    with pytest.raises(TableError, match="no encoding 'uft-8'"):
        open_table(path, encoding="uft-8")


def test_a_row_in_another_encoding_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "HEAD_BYTES", 10)
    assert table(tmp_path, b"a,b\n1,x\n2,Gr\xf6\xdfe\n3,y\n") == [
        {"a": "1", "b": "x"},
        BadRow(
            "Line 3 is not UTF-8: name the encoding with --encoding, or save the file as UTF-8.",
            {"a": "2", "b": "Gr\ufffd\ufffde"},
        ),
        {"a": "3", "b": "y"},
    ]


def test_old_line_ends_and_blank_lines(tmp_path: Path) -> None:
    assert table(tmp_path, "a,b\r1,2\r3,4\r") == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    assert table(tmp_path, "\n\na,b\n\n1,2\n  \n\n3,4\n\n") == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]


@pytest.mark.parametrize(
    ("content", "delimiter"),
    [("a;b\n1;2,5\n", ";"), ("a\tb\n1\t2,5\n", "\t"), ("a|b\n1|2,5\n", "|"), ('a;"b,c;d"\n1;2,5\n', ";")],
)
def test_another_delimiter_is_recognized_by_the_header(content: str, delimiter: str, tmp_path: Path) -> None:
    found = open_table(saved(tmp_path, content))
    assert list(found) == [dict(zip(found.columns, ["1", "2,5"], strict=True))]
    assert found.notes == [f"Its columns are separated by {delimiter!r}."]


def test_a_comma_in_the_header_decides(tmp_path: Path) -> None:
    assert open_table(saved(tmp_path, "a;x,b|y\n")).columns == ["a;x", "b|y"]
    assert open_table(saved(tmp_path, "a;x,b|y\n"), delimiter=";").columns == ["a", "x,b|y"]
    assert open_table(saved(tmp_path, "sep=;\na;b,c\n1;2\n")).columns == ["a", "b,c"]
    assert table(tmp_path, "a,b\tc\n1,2\t3\n", "t.tsv") == [{"a,b": "1,2", "c": "3"}]
    with pytest.raises(TableError, match=r"separated by ';' or '\|': name it with --delimiter"):
        open_table(saved(tmp_path, "a;b|c\n"))
    with pytest.raises(TableError, match="A delimiter is one character"):
        open_table(saved(tmp_path, "a;b\n"), delimiter="::")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("a,b,a\n1,2,3\n", "two columns are called 'a': rename one"),
        ("a,,\n1,2,3\n", "several columns have no name"),
        ("https://example.com/a.jpg\nhttps://example.com/b.jpg\n", "holds a URL where the names of columns belong"),
        ('a,"b\n1,2\n', "line 1 is not CSV"),
    ],
)
def test_a_file_without_a_header_is_refused(content: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(TableError, match=told):
        open_table(saved(tmp_path, content))


def test_ragged_rows_fail_alone(tmp_path: Path) -> None:
    cure = "put quotes around a field with ',' in it."
    assert table(tmp_path, 'a,b\n"1\n",2\n3\n4,5,6\n7,8\n') == [
        {"a": "1\n", "b": "2"},
        BadRow(f"Line 4 has 1 fields, and the header 2: {cure}", {"a": "3"}),
        BadRow(
            "Line 5 has 3 fields, and the header 2: put quotes around a field with ',' in it.", {"a": "4", "b": "5"}
        ),
        {"a": "7", "b": "8"},
    ]


@pytest.mark.parametrize("rest", ['2,y\n3,"z"\n', "2,y\n3,z\n"])
def test_a_quote_that_never_closes_costs_its_own_line(rest: str, tmp_path: Path) -> None:
    bad, *good = table(tmp_path, f'a,b\n1,"x\n{rest}')
    assert isinstance(bad, BadRow)
    assert bad.reason.startswith("Line 2 is not CSV (")
    assert good == [{"a": "2", "b": "y"}, {"a": "3", "b": "z"}]


def test_a_record_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_records, "MAX_RECORD_CHARS", 100)
    monkeypatch.setattr(text, "MAX_CHARS", 200)
    long = "x" * 1_000
    bad, *good = table(tmp_path, f'a,b\n1,"x\n{"2,y" * 3}\n' + "2,y\n" * 100)
    assert isinstance(bad, BadRow)
    assert "Line 2 has no end within 100 characters" in bad.reason
    assert good[1:] == [{"a": "2", "b": "y"}] * 100
    first, bad, last = table(tmp_path, f"a,b\n1,2\n3,{long}\n5,6\n")
    assert (first, last) == ({"a": "1", "b": "2"}, {"a": "5", "b": "6"})
    assert isinstance(bad, BadRow)


def test_a_long_field_and_a_zero_byte_are_data(tmp_path: Path) -> None:
    long = "x" * 500_000
    assert table(tmp_path, f"a,b\n1,{long}\n2,x\0y\n") == [{"a": "1", "b": long}, {"a": "2", "b": "x\0y"}]


def test_nothing_and_an_empty_text_are_told_apart(tmp_path: Path) -> None:
    content = 'a,b,c\n,"",x\n"","a""b",\n"x\ny",,""\n'
    rows = table(tmp_path, content)
    assert rows == [
        {"a": None, "b": "", "c": "x"},
        {"a": "", "b": 'a"b', "c": None},
        {"a": "x\ny", "b": None, "c": ""},
    ]
    written(tmp_path / "out.csv", ["a", "b", "c"], rows)
    assert list(open_table(str(tmp_path / "out.csv"))) == rows


# JSONL


def test_jsonl_with_bad_lines(tmp_path: Path) -> None:
    lines = [
        '{"a": 1}',
        "",
        "no json",
        "[]",
        '{"b": NaN, "c": {"d": [1]}}',
        '{"a": "\\ud83d\\ude00"}',
        '{"a": "\\ud83d"}',
    ]
    found = open_table(saved(tmp_path, "\n".join(lines), "t.jsonl"))
    rows = list(found)
    assert rows[0::3] == [{"a": 1}, {"b": None, "c": {"d": [1]}}]
    assert rows[4] == {"a": "\U0001f600"}
    assert [row.reason[:11] for row in rows if isinstance(row, BadRow)] == ["Line 3 is n", "Line 4 is n", "Line 7 hold"]
    assert found.columns == ["a", "b", "c"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_jsonl_in_other_encodings(encoding: str, tmp_path: Path) -> None:
    assert table(tmp_path, '{"a": "ß"}\n{"a": "ü"}'.encode(encoding), "t.jsonl") == [{"a": "ß"}, {"a": "ü"}]


@pytest.mark.parametrize("content", ['[{"a": 1}]', '{\n"a": 1}', "a,b\n1,2"])
def test_a_file_that_is_no_jsonl_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"not JSONL"):
        open_table(saved(tmp_path, content, "t.jsonl"))


def test_later_keys_become_columns_as_they_are_read(tmp_path: Path) -> None:
    content = '{"a": 1}\n' * 1_000 + '{"b": 2}\n'
    found = open_table(saved(tmp_path, content, "t.jsonl"))
    assert found.columns == ["a"]
    assert len(list(found)) == 1_001
    assert found.columns == ["a", "b"]
    assert len(list(found)) == 1_001


def test_keys_that_are_data_are_refused(tmp_path: Path) -> None:
    content = "".join(f'{{"key{number}": 1}}\n' for number in range(10_002))
    with pytest.raises(TableError, match="more than 10,000 keys"):
        list(open_table(saved(tmp_path, content, "t.jsonl")))


# Files


def test_what_cannot_be_opened_is_told(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"There is no file .*/none.csv\."):
        open_table(str(tmp_path / "none.csv"))
    with pytest.raises(TableError, match=r"\.xlsx is no known table"):
        open_table(saved(tmp_path, "", "a.xlsx"))
    with pytest.raises(TableError, match=r"\.xlsx cannot be written"):
        open_writer(str(tmp_path / "a.xlsx"), [])
    with pytest.raises(TableError, match="Cannot write"):
        open_writer(str(tmp_path / "none" / "a.csv"), [])


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_an_output_is_replaced_whole_or_not_at_all(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("before")
    path.chmod(0o640)
    out = open_writer(str(path), ["a"])
    out.write({"a": 1})
    out.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert path.read_text() == "before"
    with open_writer(str(path), ["a"]) as out:
        out.write({"a": 1})
    assert next(iter(open_table(str(path)))) in ({"a": "1"}, {"a": 1})
    assert [one.name for one in tmp_path.iterdir()] == [name]
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet", "a.tsv.gz"])
def test_an_output_is_checked_without_a_trace(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    check_output(str(path))
    assert list(tmp_path.iterdir()) == []
    path.write_text("before")
    check_output(str(path))
    assert path.read_text() == "before"
    for wrong in (tmp_path / "a.xlsx", tmp_path / "none" / name):
        with pytest.raises(TableError, match=r"annot be written|Cannot write"):
            check_output(str(wrong))


# What is written is read as it was


def written(path: Path, columns: list[str], rows: list[Any]) -> None:
    with open_writer(str(path), columns) as out:
        for row in rows:
            out.write(row)


any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = st.lists(
    any_text.filter(lambda name: not name.startswith("\ufeff") and "http" not in name),
    min_size=2,
    max_size=4,
    unique=True,
)


tables = names.flatmap(
    lambda columns: st.lists(st.fixed_dictionaries({name: st.none() | any_text for name in columns}), min_size=1)
)


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@given(rows=tables)
@settings(max_examples=60, deadline=None)
def test_csv_keeps_rows_and_order(suffix: str, tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> None:
    columns = list(rows[0])
    path = tmp_path_factory.getbasetemp() / f"kept.{suffix}"
    written(path, columns, rows)
    found = open_table(str(path), encoding="utf-8", delimiter="," if suffix == "csv" else "\t")
    assert found.columns == columns
    assert list(found) == rows


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(st.dictionaries(any_text, any_json, max_size=4), max_size=5))
@settings(max_examples=60, deadline=None)
def test_jsonl_keeps_rows_and_order(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> None:
    path = tmp_path_factory.getbasetemp() / "kept.jsonl"
    written(path, [], rows)
    assert list(open_table(str(path), encoding="utf-8")) == rows


def test_nested_values_and_pictures_in_csv(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    row = {"a": {"x": [1, None]}, "b": True, "c": 0.5, "d": png(), "e": b"\0\1", "f": {"bytes": png(), "path": "a.png"}}
    written(path, list(row), [row])
    (found,) = open_table(str(path))
    assert found == {
        "a": '{"x": [1, null]}',
        "b": "true",
        "c": "0.5",
        "d": None,
        "e": "AAE=",
        "f": '{"bytes": null, "path": "a.png"}',
    }
    written(tmp_path / "out.jsonl", [], [{"a": float("nan"), "b": [float("inf")]}])
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"a": None, "b": [None]}


def test_a_column_that_the_header_lacks_is_told(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="column 'b' is not among those"):
        written(tmp_path / "out.csv", ["a"], [{"b": 1}])
