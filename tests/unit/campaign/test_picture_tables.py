"""Folders of pictures and WebDataset tar files as tables."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from tasks.campaign.plan import Plan
from tasks.campaign.tables import BadRow, Picture, TableError, folder_table, open_table, open_writer, webdataset_table
from tasks.errors import ImageInvalid, ImageTooLarge
from tests.support.pictures import png


def test_a_folders_pictures_in_order(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    for name in ("cats/2.png", "cats/10.JPG", "a.webp", "dogs/small/1.png", "dogs/notes.txt", ".hidden.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png())
    table = open_table(str(root))
    assert table.columns == ["file", "folder"]
    names = [("a.webp", ""), ("cats/10.JPG", "cats"), ("cats/2.png", "cats"), ("dogs/small/1.png", "small")]
    assert list(table) == [{"file": file, "folder": folder} for file, folder in names] == list(table)
    plan = Plan("caption", image="file", set={"prompt": "A picture of {folder}:"})
    plan.check(table.columns)
    job = plan.job(list(table)[1]).arguments()  # type: ignore[arg-type]
    assert job["image"].startswith("data:image/png;base64,")
    assert job["prompt"] == "A picture of cats:"


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    root, secret = tmp_path / "pictures", tmp_path / "secret.png"
    root.mkdir()
    (root / "a.png").write_bytes(png())
    secret.write_bytes(png())
    (root / "b.png").symlink_to(secret)
    (root / "c.png").symlink_to(root / "a.png")
    (root / "more").symlink_to(tmp_path)
    first, second, third = open_table(str(root))
    assert (first["file"], third["file"]) == ("a.png", "c.png")  # type: ignore[index]
    told = "b.png is a link out of the folder: copy the picture into it."
    assert second == BadRow(told, {"file": "b.png", "folder": ""})


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="has no pictures"):
        open_table(str(tmp_path))


def test_a_picture_that_vanishes_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (row,) = open_table(str(tmp_path))
    (tmp_path / "a.png").unlink()
    with pytest.raises(ImageInvalid, match="Column 'file': the picture cannot be read") as caught:
        Plan("caption", image="file").job(row)  # type: ignore[arg-type]
    assert caught.value.detail == "no_file"


def test_what_is_no_picture_to_send_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_table, "MAX_JOB_BYTES", 1_000)
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"x" * 2_000)
    pipe, large = open_table(str(tmp_path))
    assert pipe == BadRow("a.png is no file: remove it.", {"file": "a.png", "folder": ""})
    with pytest.raises(ImageTooLarge, match="Column 'file': The picture has more than 1,000 bytes"):
        Plan("caption", image="file").job(large)  # type: ignore[arg-type]


# WebDataset


def tar(path: Path, files: dict[str, bytes], mode: str = "w") -> str:
    with tarfile.open(path, mode) as out:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return str(path)


SAMPLES = {
    "000/1.jpg": png(),
    "000/1.txt": "a cät\n".encode(),
    "000/1.json": json.dumps({"url": "https://example.com/1.jpg", "width": 8, "txt": "other"}).encode(),
    "000/2.png": png("blue"),
    "000/2.mask.png": png("green"),
    "000/2.npy": b"\x93NUMPY\0",
    "000/3.cls": b"7",
}


@pytest.mark.parametrize(("name", "mode"), [("t.tar", "w"), ("t.tar.gz", "w:gz"), ("t.tgz", "w:gz")])
def test_neighbouring_files_are_a_row(name: str, mode: str, tmp_path: Path) -> None:
    table = open_table(tar(tmp_path / name, SAMPLES, mode))
    first, second, third = list(table)
    about = {"url": "https://example.com/1.jpg", "width": 8}
    assert first == {"__key__": "000/1", "image": "000/1.jpg", "txt": "a cät", **about}
    assert second == {"__key__": "000/2", "image": "000/2.png", "mask.png": "000/2.mask.png"}
    assert third == {"__key__": "000/3", "cls": "7"}
    assert table.columns == ["__key__", "image", "txt", "url", "width", "mask.png", "cls"]
    pictures = [second["image"], second["mask.png"]]  # type: ignore[index]
    assert [one.read() for one in pictures if isinstance(one, Picture)] == [png("blue"), png("green")]
    plan = Plan("caption", image="image", set={"prompt": "{txt}"})
    assert plan.job(first).arguments()["image"].startswith("data:image/png")  # type: ignore[arg-type]


def test_rows_that_are_none_fail_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset_table, "MAX_JOB_BYTES", 1_000)
    files = {"1.jpg": png(), "1.png": png(), "2.png": b"x" * 2_000, "3.png": png(), "4.json": b"{bad", "4.png": png()}
    twice, large, good, without = open_table(tar(tmp_path / "t.tar", files))
    assert isinstance(twice, BadRow)
    assert "1 has two files 'image'" in twice.reason
    assert isinstance(large, BadRow)
    assert "2.png has more than 1,000 bytes" in large.reason
    assert good == {"__key__": "3", "image": "3.png"}
    assert without == {"__key__": "4", "image": "4.png"}


def test_a_broken_archive_is_told(tmp_path: Path) -> None:
    path = Path(tar(tmp_path / "t.tar", {"1.png": png() * 100}))
    path.write_bytes(path.read_bytes()[:2_000])
    with pytest.raises(TableError, match="is no whole tar file"):
        list(open_table(str(path)))
    path.write_bytes(b"a,b\n1,2\n" * 200)
    with pytest.raises(TableError, match="is no whole tar file"):
        open_table(str(path))
    with pytest.raises(TableError, match="has no files in it"):
        open_table(tar(path, {}))


def test_pictures_are_not_repeated_in_an_output(tmp_path: Path) -> None:
    table = open_table(tar(tmp_path / "t.tar", SAMPLES))
    for name in ("out.csv", "out.jsonl", "out.parquet"):
        with open_writer(str(tmp_path / name), table.columns) as out:
            for row in table:
                out.write(row)  # type: ignore[arg-type]
        rows = list(open_table(str(tmp_path / name)))
        assert [row.get("image") for row in rows if isinstance(row, dict)] == ["000/1.jpg", "000/2.png", None]
