"""A report's data, from an output and the state beside it."""

from __future__ import annotations

import functools
import json
import re
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import tasks.campaign.report.pictures as report_pictures
from tasks.campaign.plan import Plan
from tasks.campaign.report import Thumbnails, write_report
from tasks.campaign.report.columns import guessed
from tasks.campaign.thumbnails import SIDE, thumbnail
from tasks.cli import main
from tasks.errors import ImageInvalid, ImageUnreachable
from tests.support.campaign_output import BEGAN, answered, finish, write_output
from tests.support.pictures import data_uri, png
from tests.support.web import Quiet, serving
from worker.demo.stack import CHECKOUT

BIG = (300, 200)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><script>alert(1)</script></svg>'


class _Files(Quiet, SimpleHTTPRequestHandler):
    pass


def _data(page: Path) -> dict[str, Any]:
    [found] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return dict(json.loads(found))


def _reported(output: Path, **options: Any) -> dict[str, Any]:
    page = output.with_suffix(".html")
    write_report(str(output), str(page), **options)
    return _data(page)


def _outcome(row: int) -> Any:
    if row == 3:
        return ImageUnreachable("The server is away: try later.")
    return None if row == 5 else answered("cat" if row % 2 else "duck", 0.9 / row, seconds=row)


ROWS = [{"sku": f"s{row}", "name": f"Photo {row}", "url": f"https://cdn.example/{row}.jpg"} for row in range(1, 6)]


def test_a_report_tells_all_of_a_campaign(tmp_path: Path) -> None:
    write_output(tmp_path / "out.csv", ROWS, _outcome)
    data = _reported(tmp_path / "out.csv")
    assert data["totals"] == {
        "rows": 5, "answered": 3, "failed": 1, "open": 1, "prompt_tokens": 120, "completion_tokens": 6,
    }  # fmt: skip
    assert data["codes"] == [{"name": "image_unreachable", "count": 1}]
    assert data["hosts"] == [{"name": "cdn.example", "failed": 1, "rows": 5}]
    assert data["labels"] == [{"name": "duck", "count": 2}, {"name": "cat", "count": 1}]
    assert data["latency"]["p50"] == pytest.approx(2.0, rel=0.02)
    assert data["rate"] == {"start": BEGAN + 1, "width_s": 1, "answered": [1, 1, 0, 1], "failed": [0, 0, 1, 0]}
    assert data["stages"][0] == {"name": "queue", "seconds": pytest.approx((1 + 2 + 4) / 2 / 3)}
    assert ["labels", '["cat", "duck"]'] in data["asked"]
    assert ["Model", "demo (idefics, float32)"] in data["asked"]
    # As others see it: the ids of its jobs are made from its own.
    assert "c0ffee" not in json.dumps(data)
    assert data["seconds"] == 90.0
    assert data["columns"] == ["name"]


def test_a_row_has_its_answer_or_its_error(tmp_path: Path) -> None:
    write_output(tmp_path / "out.csv", ROWS, _outcome)
    first, _, failed, _, still_open = _reported(tmp_path / "out.csv")["items"]
    assert first["state"] == "answered"
    assert (first["id"], first["label"], first["score"], first["seconds"]) == ("s1", "cat", 0.9, 1.0)
    assert first["scores"] == [["cat", 0.9], ["other", pytest.approx(0.1)]]
    assert (first["image"], first["others"], first["tokens"]) == (ROWS[0]["url"], ["Photo 1"], [40, 2])
    assert (failed["state"], failed["code"], failed["error"]) == (
        "failed", "image_unreachable", "The server is away: try later.",
    )  # fmt: skip
    assert still_open["state"] == "open"
    assert "code" not in still_open


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".csv.gz"])
def test_an_output_alone_makes_a_report(tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"out{suffix}"
    write_output(output, ROWS, _outcome, has_state=False)
    page = tmp_path / "page.html"
    write_report(str(output), str(page))
    data = _data(page)
    assert data["totals"]["failed"] == 1
    assert data["hosts"] == [{"name": "cdn.example", "failed": 1, "rows": 5}]
    assert data["items"][0]["image"] == ROWS[0]["url"]
    assert data["rate"] is None
    assert data["title"] == output.name
    assert "no prompts and no rate" in data["notes"][0]


def test_a_prompt_is_the_rows_own(tmp_path: Path) -> None:
    plan = Plan(task="answer", image="url", set={"question": "What colour is {name}?"}, columns={"colour": "text"})
    write_output(tmp_path / "out.csv", ROWS, lambda _: answered("red", 1.0), plan=plan)
    item = _reported(tmp_path / "out.csv")["items"][1]
    assert item["prompt"] == "What colour is Photo 2?"
    assert item["answer"] == "red"


def test_rows_that_were_left_out_do_not_shift_the_others(tmp_path: Path) -> None:
    write_output(tmp_path / "out.csv", ROWS, _outcome, left_out=[1, 2])
    items = _reported(tmp_path / "out.csv")["items"]
    assert [item["row"] for item in items] == [3, 4, 5]
    assert [item.get("job") for item in items] == ["job-3", "job-4", None]


def test_of_many_rows_a_sample_is_shown_and_said_so(tmp_path: Path) -> None:
    rows = [{"sku": str(row), "url": "https://cdn.example/a.jpg"} for row in range(1, 201)]
    refused = ImageInvalid("No picture.")
    write_output(tmp_path / "out.csv", rows, lambda row: refused if row % 50 == 0 else answered("cat", 0.5))
    data = _reported(tmp_path / "out.csv", rows=20)
    assert data["totals"]["rows"] == 200
    assert data["sample"] == {"rows": 20, "of": 200}
    assert sum(item["state"] == "failed" for item in data["items"]) == 4
    assert data["items"] == _reported(tmp_path / "out.csv", rows=20)["items"]
    assert "sample of 20, with 4 of the 4 failed ones" in data["notes"][0]


# Pictures


def test_pictures_in_the_table_get_thumbnails_and_those_on_the_web_do_not(tmp_path: Path) -> None:
    rows = [
        {"sku": "a", "url": data_uri(png("red", BIG))},
        {"sku": "b", "url": "http://127.0.0.1:9/b.png"},
        {"sku": "c", "url": f"data:image/svg+xml;base64,{data_uri(SVG).partition(',')[2]}"},
    ]
    write_output(tmp_path / "out.csv", rows, lambda _: answered("cat", 0.5))
    data = _reported(tmp_path / "out.csv")
    assert [item.get("thumb", "")[:23] for item in data["items"]] == ["data:image/webp;base64,", "", ""]
    assert data["thumbnails"] == {"shown": 1}


def test_none_are_made_where_none_are_wanted(tmp_path: Path) -> None:
    write_output(tmp_path / "out.csv", [{"sku": "a", "url": data_uri(png("red"))}], lambda _: answered("cat", 0.5))
    assert "thumb" not in _reported(tmp_path / "out.csv", thumbnails=Thumbnails.NONE)["items"][0]


def test_files_of_the_campaigns_folder_get_thumbnails_and_no_others(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(png("red"))
    (tmp_path / "secret.png").write_bytes(png("blue"))
    rows = [{"sku": "a", "url": "a.png"}, {"sku": "b", "url": "../secret.png"}, {"sku": "c", "url": "away.png"}]
    plan = Plan(task="caption", image="url", id="sku", images_in=str(folder))
    write_output(tmp_path / "out.csv", rows, lambda _: answered("cat", 0.5), plan=plan)
    assert ["thumb" in item for item in _reported(tmp_path / "out.csv")["items"]] == [True, False, False]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_pictures_that_only_the_input_has_are_found_there(tmp_path: Path, suffix: str) -> None:
    folder, output = tmp_path / "pictures", tmp_path / f"out{suffix}"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.png").write_bytes(png("red"))
    finish(folder, output, lambda _: answered("cat", 0.5), plan=Plan(task="caption", image="file"))
    items = _reported(output)["items"]
    assert [item["image"] for item in items] == ["a.png", "b.png", "c.png"]
    assert ["thumb" in item for item in items] == [True, True, True]
    # A picture that came later moves the others: its neighbours' answers are not its own.
    (folder / "aa.png").write_bytes(png("blue"))
    assert ["thumb" in item for item in _reported(output)["items"]] == [True, False, False]


def test_pictures_on_the_web_are_downloaded_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.png").write_bytes(png("red", BIG))
    (tmp_path / "files" / "b.png").write_bytes(b"no picture")
    with serving(functools.partial(_Files, directory=tmp_path / "files")) as port:
        rows = [{"sku": name, "url": f"http://127.0.0.1:{port}/{name}.png"} for name in "abc"]
        write_output(tmp_path / "out.csv", rows, lambda _: answered("cat", 0.5))
        items = _reported(tmp_path / "out.csv", thumbnails=Thumbnails.FETCH)["items"]
    assert ["thumb" in item for item in items] == [True, False, False]


def test_a_pages_thumbnails_have_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"sku": str(row), "url": data_uri(png("red"))} for row in range(4)]
    write_output(tmp_path / "out.csv", rows, lambda _: answered("cat", 0.5))
    small = thumbnail(png("red"))
    assert small is not None
    monkeypatch.setattr(report_pictures, "MAX_CHARS", 2 * len(small))
    data = _reported(tmp_path / "out.csv")
    assert data["thumbnails"] == {"shown": 2}
    assert "2 more rows have pictures" in data["notes"][0]


@pytest.mark.parametrize("content", [SVG, b"", b"\x89PNG\r\n\x1a\n", b"GIF89a" + b"\xff" * 100], ids=len)
def test_what_is_no_picture_has_no_thumbnail(content: bytes) -> None:
    assert thumbnail(content) is None


def test_a_thumbnail_is_small(tmp_path: Path) -> None:
    small = thumbnail((CHECKOUT / "examples" / "pictures" / "cat.png").read_bytes())
    assert small is not None
    assert len(small) < 20_000
    assert SIDE < 256


# Columns


def test_the_column_with_pictures_is_found() -> None:
    rows = [{"page": "https://shop.example/1", "photo": "https://cdn.example/1.jpg", "text": "A cat."}]
    columns = guessed(["page", "photo", "text"], rows)
    assert columns.image == "photo"
    assert columns.by_field == {"text": "text"}
    assert guessed(["page", "photo", "text"], rows, "page").image == "page"
    assert guessed(["name"], [{"name": "a cat"}]).image is None


# The command


def test_the_command_writes_the_page_and_says_what_is_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_output(tmp_path / "out.csv", ROWS, _outcome)
    done = CliRunner().invoke(main, ["report", "out.csv", "--json"])
    assert json.loads(done.output) == {"page": "out.html", "rows": 5, "shown": 5, "thumbnails": 0}
    assert (tmp_path / "out.html").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["away.csv"], "no file away.csv"),
        (["out.csv", "-o", "away/page.html"], "Cannot write away/page.html"),
        (["out.csv", "--image", "urk"], "Did you mean 'url'?"),
        (["broken.csv"], "not a campaign's state"),
    ],
)
def test_what_cannot_be_reported_is_told_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_output(tmp_path / "out.csv", ROWS, _outcome)
    write_output(tmp_path / "broken.csv", ROWS, _outcome, has_state=False)
    (tmp_path / "broken.csv.campaign").write_text("a text")
    done = CliRunner().invoke(main, ["report", *arguments])
    assert done.exit_code == 1
    assert says in done.output
