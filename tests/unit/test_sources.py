"""Images in data: URIs and in files below the operator's folder."""

from __future__ import annotations

import os
import socket
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import ImageBlocked, ImageInvalid, ImageTooLarge, JobError
from tasks.payload_fields import ImagePath, ImageSource
from tests.support.pictures import data_uri
from tests.unit.web.servers import BODY, LEAVES_S, MAX_BYTES, open_files, within
from worker.images.fetch import FetchPolicy
from worker.images.sources import SourceReader, decode_data_uri, read_below

SECRET = "s3cr3t-token"


@pytest.mark.parametrize("size", [0, 1, 2, 3, 1000])
def test_a_data_uri_is_decoded(size: int) -> None:
    assert decode_data_uri(data_uri(BODY[:size]), MAX_BYTES) == BODY[:size]
    assert decode_data_uri(data_uri(BODY[:size]).replace("data:image", "DATA:Image"), MAX_BYTES) == BODY[:size]


@pytest.mark.parametrize(
    "uri",
    [
        "data:image/png;base64,YWJj",
        "DATA:IMAGE/PNG;BASE64,YWJj",
        "data:image/png;base64,YWJj\n",
        "data:image/png;base64,YW\r\nJj",
        "data:image/png;base64, Y W J j ",
        "data:image/png;base64,%59WJj",
        "data:image/png;base64,YWJj%0A",
        "data:image/png;charset=utf-8;base64,YWJj",
        'data:image/jpeg;name="a b.jpg";base64,YWJj',
        "data:image/svg+xml;charset=utf-8; base64,YWJj",
        "data:application/octet-stream;base64,YWJj",
    ],
)
def test_a_data_uri_is_read_as_url_readers_take_it(uri: str) -> None:
    assert decode_data_uri(uri, MAX_BYTES) == b"abc"


@pytest.mark.parametrize(
    ("text", "data"), [("YQ", b"a"), ("YWI", b"ab"), ("YQ%3D%3D", b"a"), ("YWI%3d", b"ab"), ("", b"")]
)
def test_base64_may_lack_its_padding(text: str, data: bytes) -> None:
    assert decode_data_uri(f"data:image/png;base64,{text}", MAX_BYTES) == data


@pytest.mark.parametrize(
    "uri",
    [
        "data:image/png,hi",
        "data:image/png;base64",
        "data:;base64,YQ==",
        "data:text/plain;base64,YQ==",
        "data:image/png;base64;x=1,YQ==",
        f"data:image/png;{'a' * 2_000};base64,YQ==",
    ],
)
def test_other_data_uris_are_refused(uri: str) -> None:
    with pytest.raises(ImageBlocked, match="base64"):
        decode_data_uri(uri, MAX_BYTES)


@pytest.mark.parametrize("text", ["YQ=", "Y", "YQ==YQ==", "Y Q=", "YW-_", "YWJé", "=", "====", "%", "YQ===", "Y%ZZQ"])
def test_loose_base64_is_refused(text: str) -> None:
    with pytest.raises(ImageInvalid):
        decode_data_uri(f"data:image/png;base64,{text}", MAX_BYTES)


@pytest.mark.parametrize("spare", [0, 1, 2, 3])
def test_a_data_uri_beyond_the_cap_is_refused_before_it_is_decoded(spare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(decode_data_uri(data_uri(b"x" * (100 + spare)), 100 + spare)) == 100 + spare
    monkeypatch.setattr("binascii.a2b_base64", None)
    with pytest.raises(ImageTooLarge):
        decode_data_uri(data_uri(b"x" * (101 + spare)), 100 + spare)


# Paths


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "images-of-others").mkdir()
    (tmp_path / "images-of-others" / "x.jpg").write_bytes(b"secret")
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    (root / "a" / "b.jpg").write_bytes(BODY)
    return root


def test_a_path_below_the_root_is_read(root: Path) -> None:
    (root / "link.jpg").symlink_to("a/b.jpg")
    (root / "linked").symlink_to(root / "a")
    for path in ("a/b.jpg", "./a//b.jpg", "link.jpg", "linked/b.jpg"):
        assert read_below(root, path, MAX_BYTES) == BODY


def test_a_root_that_is_itself_a_link_works(root: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(root)
    assert read_below(tmp_path / "current", "a/b.jpg", MAX_BYTES) == BODY


def test_without_a_root_no_path_is_read() -> None:
    with pytest.raises(ImageBlocked, match="IDEFICS_IMAGE_ROOT"):
        read_below(None, "a/b.jpg", MAX_BYTES)


@pytest.mark.parametrize(
    "path",
    [
        "../secret.jpg",
        "a/../../secret.jpg",
        "a/../a/b.jpg",
        "../images/a/b.jpg",
        "../images-of-others/x.jpg",
        "/etc/passwd",
        "//etc/passwd",
        "..",
        ".",
        "a/b.jpg\0.png",
    ],
)
def test_a_path_out_of_the_root_is_refused(path: str, root: Path) -> None:
    with pytest.raises(ImageBlocked):
        read_below(root, path, MAX_BYTES)


def test_an_absolute_path_into_the_root_is_refused(root: Path) -> None:
    with pytest.raises(ImageBlocked):
        read_below(root, str(root / "a" / "b.jpg"), MAX_BYTES)


def test_a_link_out_of_the_root_is_refused(root: Path, tmp_path: Path) -> None:
    (root / "file.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "folder").symlink_to(tmp_path)
    (root / "relative.jpg").symlink_to("../secret.jpg")
    (root / "process").symlink_to("/proc/self")
    for path in ("file.jpg", "folder/secret.jpg", "relative.jpg", "process/environ"):
        with pytest.raises(ImageBlocked):
            read_below(root, path, MAX_BYTES)


def test_a_folder_replaced_by_a_link_after_the_check_is_not_followed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b.jpg").write_bytes(b"secret")
    (root / "link").symlink_to("a")
    real = Path.relative_to

    def exchange(self: Path, *args: Any) -> Path:
        (root / "a").rename(root / "old")
        (root / "a").symlink_to(tmp_path)
        return real(self, *args)

    monkeypatch.setattr(Path, "relative_to", exchange)
    with pytest.raises(ImageInvalid):
        read_below(root, "link/b.jpg", MAX_BYTES)


def test_anything_but_a_regular_file_is_refused_without_waiting(root: Path) -> None:
    os.mkfifo(root / "fifo.jpg")
    (root / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listener:
        # Relative, since a socket's name is short.
        listener.bind(os.path.relpath(root / "socket"))
    for path in ("fifo.jpg", "a", "socket", "missing.jpg", "a/b.jpg/c", "loop", "x" * 300):
        with within(LEAVES_S), pytest.raises(ImageInvalid):
            read_below(root, path, MAX_BYTES)


def test_a_device_is_refused() -> None:
    with pytest.raises(ImageInvalid):
        read_below(Path("/dev"), "zero", MAX_BYTES)


def test_a_file_beyond_the_cap_is_refused(root: Path) -> None:
    assert read_below(root, "a/b.jpg", len(BODY)) == BODY
    with pytest.raises(ImageTooLarge):
        read_below(root, "a/b.jpg", len(BODY) - 1)


def test_a_refused_path_is_not_repeated(root: Path) -> None:
    for path in (f"../{SECRET}", f"missing/{SECRET}", f"/{SECRET}"):
        with pytest.raises(JobError) as refusal:
            read_below(root, path, MAX_BYTES)
        assert SECRET not in "".join(traceback.format_exception(refusal.value))


def test_no_descriptor_stays_open_after_paths(root: Path) -> None:
    before = open_files()
    for path in ("a/b.jpg", "a", "missing", "a/b.jpg/c"):
        with suppress(JobError):
            read_below(root, path, MAX_BYTES)
    assert open_files() == before


# The three kinds told apart


def test_a_reader_tells_data_from_paths(root: Path) -> None:
    reader = SourceReader(FetchPolicy(root=root))
    assert reader.read(data_uri(BODY)) == reader.read("DATA" + data_uri(BODY)[4:]) == BODY
    assert reader.read(ImagePath(path="a/b.jpg")) == BODY
    with pytest.raises(ImageBlocked, match="URL"):
        reader.read("file:///etc/passwd")


@pytest.mark.parametrize(
    ("detail", "source"),
    [
        ("data_uri", "data:image/png;base64,*"),
        ("data_uri", "data:text/plain,hi"),
        ("path", ImagePath.model_construct(path="../a")),
        ("no_file", ImagePath(path="none.jpg")),
        ("bytes", f"data:image/png;base64,{'A' * 1_000}"),
    ],
)
def test_the_detail_of_a_failure_names_its_cause(detail: str, source: ImageSource, root: Path) -> None:
    with pytest.raises(JobError) as failure:
        SourceReader(FetchPolicy(root=root, max_bytes=100)).read(source)
    assert failure.value.detail == detail


def test_a_refusal_names_the_setting_that_would_allow_it_and_nothing_of_the_source(root: Path) -> None:
    below = FetchPolicy(root=root, max_bytes=10)
    for setting, source, policy in [
        ("IDEFICS_IMAGE_ROOT", ImagePath(path=SECRET), FetchPolicy()),
        ("IDEFICS_IMAGE_ROOT", ImagePath.model_construct(path=f"../{SECRET}"), below),
        ("IDEFICS_IMAGE_MAX_BYTES", f"data:image/png;base64,{SECRET * 10}", below),
    ]:
        with pytest.raises(JobError, match=setting) as refused:
            SourceReader(policy).read(source)
        assert SECRET not in str(refused.value)


@pytest.mark.parametrize("uri", [f"data:image/png;base64,{SECRET}", f"data:text/plain,{SECRET}"])
def test_no_refusal_holds_a_data_uris_content(uri: str) -> None:
    with pytest.raises(JobError) as refusal:
        decode_data_uri(uri, MAX_BYTES)
    assert SECRET not in "".join(traceback.format_exception(refusal.value))
