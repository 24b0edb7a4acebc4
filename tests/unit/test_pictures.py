"""Pictures that a producer has at hand, as they become `data:` URIs."""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastapi
import PIL.Image
import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from tasks import (
    Answer,
    Caption,
    CaptionExample,
    Chat,
    Complete,
    ConfigurationError,
    IdeficsError,
    Image,
    ImageInvalid,
    ImagePath,
    Write,
)
from tasks import payloads as payloads_module
from tests.support import pictures
from worker.images.decode import open_image

URL = "https://example.com/a.jpg"


def encoded(form: str = "PNG", size: tuple[int, int] = (40, 20), mode: str = "RGB", **options: Any) -> bytes:
    return pictures.encoded(PIL.Image.linear_gradient("L").resize(size).convert(mode), form, **options)


PNG = encoded()
PNG_URI = pictures.data_uri(PNG)


def decoded(uri: str) -> bytes:
    return base64.b64decode(uri.partition(",")[2])


@pytest.mark.parametrize(
    ("form", "kind"), [("JPEG", "jpeg"), ("PNG", "png"), ("GIF", "gif"), ("WEBP", "webp"), ("AVIF", "avif")]
)
def test_bytes_are_named_by_what_they_are(form: str, kind: str) -> None:
    data = encoded(form)
    uri = Image.from_bytes(data)
    assert uri.startswith(f"data:image/{kind};base64,")
    assert decoded(uri) == data
    assert Image.from_bytes(memoryview(data)) == Image.from_bytes(bytearray(data)) == uri


@pytest.mark.parametrize("data", [b"", b"text", b"<svg xmlns=''/>", b"BM....", b"%PDF-1.7", encoded("TIFF")])
def test_what_is_no_picture_of_these_forms_is_invalid(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(data)
    for read in (lambda: Image.from_bytes(data), lambda: Image.from_file(tmp_path / "cat.png")):
        with pytest.raises(ImageInvalid, match="PNG") as refused:
            read()
        assert refused.value.detail == "not_a_picture"


class Upload:
    """As Django's FieldFile: closed until it is opened, or at the end of what was just saved."""

    def __init__(self, content: bytes, closed: bool) -> None:
        self._file = io.BytesIO(content)
        self._file.seek(0, io.SEEK_END)
        self.closed = closed

    def open(self, mode: str = "rb") -> Upload:
        self.closed = False
        self._file.seek(0)
        return self

    def read(self, most: int = -1) -> bytes:
        assert not self.closed
        return self._file.read(most)

    def close(self) -> None:
        self.closed = True


class NoUpload:
    """As Django's FieldFile of a row without a file."""

    closed = False

    def open(self, mode: str = "rb") -> None:
        raise ValueError("The 'photo' attribute has no file associated with it.")

    def read(self, most: int = -1) -> bytes:
        raise AssertionError


def at_end() -> io.BytesIO:
    file = io.BytesIO(PNG)
    file.read()
    return file


SOURCES: dict[str, Callable[[Path], Any]] = {
    "a path": lambda path: path,
    "bytes": lambda path: PNG,
    "an open file": lambda path: path.open("rb"),
    "a file at its end": lambda path: at_end(),
    "Django's, closed": lambda path: Upload(PNG, closed=True),
    "Django's, open": lambda path: Upload(PNG, closed=False),
    "FastAPI's": lambda path: fastapi.UploadFile(io.BytesIO(PNG)),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_payload_takes_a_picture_that_is_at_hand(kind: str, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(PNG)

    def source() -> Any:
        return SOURCES[kind](tmp_path / "cat.png")

    assert Image.from_file(source()) == PNG_URI
    assert Caption(image=source()).arguments() == {"image": PNG_URI}
    example = CaptionExample(image=source(), text="a cat")
    assert Caption(image=URL, examples=[example]).examples[0].image == PNG_URI
    assert Answer(image=source(), question="?").image == PNG_URI
    assert Write(images=[URL, source()]).images == [URL, PNG_URI]
    said = Complete(prompt=[source(), "is", {"image": source()}]).arguments()["prompt"]  # type: ignore[list-item]
    assert said == [{"image": PNG_URI}, {"text": "is"}, {"image": PNG_URI}]
    content: Any = [{"type": "image_url", "image_url": {"url": source()}}]
    chat = Chat.model_validate({"messages": [{"role": "user", "content": content}]})
    assert chat.arguments()["messages"][0]["content"][0]["image_url"]["url"] == PNG_URI


def test_a_file_that_was_closed_is_closed_again_and_an_open_one_stays_open(tmp_path: Path) -> None:
    closed, opened = Upload(PNG, closed=True), Upload(PNG, closed=False)
    Image.from_file(closed)
    Image.from_file(opened)
    assert (closed.closed, opened.closed) == (True, False)


def test_a_pillow_image_is_sent_without_loss() -> None:
    picture = PIL.Image.open(io.BytesIO(PNG))
    uri = Caption(image=picture).image  # type: ignore[arg-type]
    assert isinstance(uri, str)
    assert PIL.Image.open(io.BytesIO(decoded(uri))).tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    "source",
    [Path("/nowhere/s3cret.png"), Path("/"), NoUpload(), io.StringIO("text"), b"no picture", Path("a\0b")],
    ids=["missing", "folder", "no upload", "text", "no picture", "null"],
)
def test_what_cannot_be_read_is_an_invalid_image_in_every_way(source: Any) -> None:
    for build in (lambda: Image.from_file(source), lambda: Caption(image=source)):
        with pytest.raises(ImageInvalid) as refused:
            build()
        assert refused.value.detail in ("no_file", "not_a_picture")
        assert "s3cret" not in str(refused.value)
    with pytest.raises(ValidationError):
        Caption.model_validate({"image": source})
    with pytest.raises(IdeficsError):
        Write(images=[source])


def test_a_text_is_never_read_as_a_path(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(PNG)
    with pytest.raises(IdeficsError, match="an image is"):
        Caption(image=str(tmp_path / "cat.png"))


# Scaled down


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_large_picture_is_scaled_down(form: str, mode: str) -> None:
    small = decoded(Image.from_bytes(encoded(form, (400, 200), mode), max_side=100))
    assert open_image(small).size == (100, 50)


def test_a_small_picture_stays_as_it_is() -> None:
    assert Image.from_bytes(PNG, max_side=40) == PNG_URI


def test_a_scaled_picture_stands_upright_and_keeps_its_transparency() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    turned = decoded(Image.from_bytes(encoded("JPEG", (400, 200), exif=exif), max_side=100))
    assert open_image(turned).size == (50, 100)
    clear = io.BytesIO(pictures.encoded(PIL.Image.new("RGBA", (200, 200), (255, 0, 0, 0))))
    assert open_image(decoded(Image.from_bytes(clear.getvalue(), max_side=50))).getpixel((5, 5)) == (255, 255, 255)


def test_scaling_needs_pillow_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigurationError, match="pip install pillow"):
        Image.from_bytes(PNG, max_side=10)
    assert Image.from_bytes(PNG) == PNG_URI


def test_what_cannot_be_scaled_is_told() -> None:
    with pytest.raises(ImageInvalid):
        Image.from_bytes(PNG[:60], max_side=10)
    with pytest.raises(ConfigurationError, match="max_side"):
        Image.from_bytes(PNG, max_side=0)


# As a type


def test_the_class_is_still_a_type_for_models_of_yours() -> None:
    assert payloads_module.Image is Image

    class Body(BaseModel):
        photo: Image

    assert Body.model_validate({"photo": URL}).photo == URL
    assert TypeAdapter(Image).validate_python({"path": "a"}) == ImagePath(path="a")
    with pytest.raises(ValidationError):
        Body.model_validate({"photo": "file:///etc/passwd"})
