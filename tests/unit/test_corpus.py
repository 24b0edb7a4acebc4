"""Pillow's own crash corpus, opened as a job's pictures are."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import corpus


def test_every_file_of_pillows_own_tests_opens_or_is_refused_in_time(tmp_path: Path) -> None:
    try:
        archive = corpus.fetched(tmp_path)
    except corpus.NotFetched as error:
        pytest.skip(f"Pillow's source distribution cannot be fetched here: {error}")
    found = corpus.opened(archive)
    assert found["tried"] > 1_000
    assert set(found["ends"]) == {"crash", "timeout", "oom", "ossfuzz", "other"}
    assert {end for ends in found["ends"].values() for end in ends} == {"opened", "image_invalid", "image_too_large"}
    assert found["ends"]["other"]["opened"] > 400
    assert found["slowest_ms"] < 2_000
    assert found["peak_mb"] < 300


def packed(folder: Path, **files: bytes) -> Path:
    archive = folder / "pillow.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"pillow-1.0{corpus.IMAGES}{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return archive


def test_ends_are_counted_by_kind(tmp_path: Path) -> None:
    good = io.BytesIO()
    Image.new("RGB", (4, 4)).save(good, "PNG")
    found = corpus.opened(packed(tmp_path, **{"a/good.png": good.getvalue(), "crash-1.sgi": b"\x01\xda", "empty": b""}))
    assert found["ends"] == {"crash": {"image_invalid": 1}, "other": {"opened": 1, "image_invalid": 1}}


def test_a_file_that_kills_its_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_open", os._exit)
    monkeypatch.setattr(corpus, "files", lambda _: [("killer.gif", 9)])
    with pytest.raises(RuntimeError, match=r"killer\.gif kills"):
        corpus.opened(tmp_path)


def test_a_distribution_that_is_not_there_is_told_from_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus.metadata, "version", lambda _: "0.0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(corpus.NotFetched, match=r"pillow==0\.0\.0"):
        corpus.fetched(tmp_path)
