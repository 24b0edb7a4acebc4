"""Parquet and Arrow: types, order and unusual values are kept; what cannot be is told."""

from __future__ import annotations

import datetime
import decimal
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import feather, parquet

from tasks.campaign.plan import Plan
from tasks.campaign.tables import Row, TableError, arrow_tables, open_table, open_writer, parquet_writer
from tests.support.pictures import png

SCHEMA = pa.schema(
    [
        pa.field("text", pa.string(), nullable=False),
        ("int", pa.int16()),
        ("float", pa.float32()),
        ("bool", pa.bool_()),
        ("time", pa.timestamp("us", tz="UTC")),
        ("nanoseconds", pa.timestamp("ns")),
        ("span", pa.duration("ns")),
        ("far", pa.date64()),
        ("decimal", pa.decimal128(10, 2)),
        ("kind", pa.dictionary(pa.int32(), pa.string())),
        ("list", pa.list_(pa.string())),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    ],
    metadata={"about": "pictures", "huggingface": "{}"},
)


def sample() -> pa.Table:
    now = datetime.datetime(2026, 11, 30, tzinfo=datetime.UTC)
    columns: dict[str, list[Any]] = {
        "text": ["a", "", "ß"],
        "int": [1, None, -3],
        "float": [0.5, None, float("inf")],
        "bool": [True, None, False],
        "time": [now, None, now],
        "nanoseconds": pa.array([1_234_567_891, None, 3], pa.timestamp("ns")),
        "span": pa.array([1, None, 3], pa.duration("ns")),
        "far": pa.array([10**16 // 86_400_000 * 86_400_000, None, 0], pa.date64()),
        "decimal": [decimal.Decimal("1.50"), None, decimal.Decimal("-2.25")],
        "kind": ["x", None, "x"],
        "list": [["a", "b"], None, []],
        "image": [{"bytes": png(), "path": "a.png"}, None, {"bytes": None, "path": "b.png"}],
    }
    return pa.table(columns, schema=SCHEMA)


def copied(source: str, target: Path, more: dict[str, type]) -> None:
    table = open_table(source)
    with open_writer(str(target), [*table.columns, *more], table.schema, more) as out:
        for row in table:
            assert isinstance(row, dict)
            out.write({**row, **{name: kind(1) if kind is not object else {"a": 1} for name, kind in more.items()}})


@pytest.mark.parametrize("name", ["t.parquet", "t.feather", "t.arrow"])
def test_values_of_every_type_come_back(name: str, tmp_path: Path) -> None:
    source, table = str(tmp_path / name), sample()
    if name == "t.parquet":
        parquet.write_table(table, source, row_group_size=2)
    elif name == "t.feather":
        feather.write_feather(table, source, compression="zstd")
    else:
        with pa.ipc.new_stream(source, table.schema) as out:
            out.write_table(table, max_chunksize=2)
    found = open_table(source)
    assert found.columns == table.schema.names
    assert found.count == (None if name == "t.arrow" else 3)
    copied(source, tmp_path / "out.parquet", {"answer": str, "n": int, "score": float, "all": object})
    again = parquet.read_table(tmp_path / "out.parquet")
    assert again.select(table.schema.names).cast(found.schema).equals(table.cast(found.schema))
    assert (
        again.drop_columns(table.schema.names).to_pylist()
        == [{"answer": "1", "n": 1, "score": 1.0, "all": '{"a": 1}'}] * 3
    )
    assert again.schema.field("kind").type == SCHEMA.field("kind").type
    assert (again.schema.metadata[b"about"], b"huggingface" in again.schema.metadata) == (b"pictures", False)


def test_what_python_has_no_type_for_is_a_text_elsewhere(tmp_path: Path) -> None:
    parquet.write_table(sample(), tmp_path / "t.parquet")
    first, *_ = open_table(str(tmp_path / "t.parquet"))
    assert isinstance(first, dict)
    assert first["nanoseconds"] == "1970-01-01 00:00:01.234567891"
    plan = Plan("caption", image="image", set={"prompt": "{nanoseconds} {int}"})
    assert plan.job(first).arguments()["prompt"] == "1970-01-01 00:00:01.234567891 1"
    copied(str(tmp_path / "t.parquet"), tmp_path / "out.csv", {"answer": str})
    row = next(iter(open_table(str(tmp_path / "out.csv"))))
    assert isinstance(row, dict)
    assert {row[name] for name in ("nanoseconds", "decimal", "bool")} == {
        "1970-01-01 00:00:01.234567891",
        "1.50",
        "true",
    }


def test_rows_are_read_in_pieces_whose_bytes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_tables, "BATCH_BYTES", 10_000)
    monkeypatch.setattr(parquet_writer, "BATCH_ROWS", 7)
    monkeypatch.setattr(parquet_writer, "GROUP_ROWS", 21)
    path = tmp_path / "t.parquet"
    rows = [{"a": f"{number}" * 100} for number in range(1_000)]
    with open_writer(str(path), ["a"]) as out:
        for row in rows:
            out.write(row)
    assert parquet.ParquetFile(path).metadata.num_row_groups == 48
    assert list(open_table(str(path))) == rows
    feather.write_feather(pa.Table.from_pylist(rows), str(tmp_path / "t.feather"))
    assert list(open_table(str(tmp_path / "t.feather"))) == rows


any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)


@given(st.lists(st.fixed_dictionaries({"a": st.none() | any_text, "b": st.none() | any_text}), max_size=20))
@settings(max_examples=40, deadline=None)
def test_parquet_keeps_rows_and_order(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> None:
    path = str(tmp_path_factory.getbasetemp() / "kept.parquet")
    with open_writer(path, ["a", "b"]) as out:
        for row in rows:
            out.write(row)
    table = open_table(path)
    assert table.count == len(rows)
    assert list(table) == rows


# What cannot be read or written


@pytest.mark.parametrize("name", ["t.parquet", "t.feather", "t.arrow"])
def test_a_file_of_another_kind_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("a,b\n1,2\n")
    with pytest.raises(TableError, match=f"{name} cannot be read"):
        open_table(str(tmp_path / name))


def test_what_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"compressed as a whole \(\.gz\)"):
        open_table(str(tmp_path / "t.parquet.gz"))
    with pytest.raises(TableError, match=r"compressed within: leave \.zst out"):
        open_writer(str(tmp_path / "t.parquet.zst"), ["a"])
    parquet.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"]), tmp_path / "twice.parquet")
    with pytest.raises(TableError, match="two columns are called 'a'"):
        open_table(str(tmp_path / "twice.parquet"))
    assert {path.name for path in tmp_path.iterdir()} == {"twice.parquet"}


@pytest.mark.parametrize(
    ("row", "told"), [({"n": "x"}, r"a value does not fit column 'n' \(int64\)"), ({"c": 1}, "column 'c' is not among")]
)
def test_a_row_that_does_not_fit_leaves_the_output_as_it_was(row: Row, told: str, tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    path.write_text("before")

    def write() -> None:
        with open_writer(str(path), ["n"], types={"n": int}) as out:
            out.write(row)

    with pytest.raises(TableError, match=told):
        write()
    assert path.read_text() == "before"
    assert [one.name for one in tmp_path.iterdir()] == ["out.parquet"]


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow", "t.csv.zst", "memory://t.csv"])
def test_a_missing_package_is_told_with_the_cure(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = name if "://" in name else str(tmp_path / name)
    Path(tmp_path / name.rpartition("/")[2]).write_bytes(b"")
    for module in ("pyarrow", "fsspec", "fsspec.core"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TableError, match=r"pip install 'idefics-jobs\[data\]'"):
        open_table(path)
