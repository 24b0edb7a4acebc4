"""How people write an image's URL, and what becomes of it."""

from __future__ import annotations

import base64
import contextlib
import time

import pytest

from tasks import ImageBlocked, InvalidRequest
from tasks.image_sources import image_url, is_meant_as_image
from tasks.payloads import Complete, parse
from tasks.prompt_parts import ImagePart, TextPart

URL = "https://example.com/a.png"
JPEG = base64.b64encode(b"\xff\xd8\xff" + bytes(99)).decode()


@pytest.mark.parametrize(
    ("text", "url"),
    [
        *(
            (text, URL)
            for text in (f" {URL}", f"{URL}\n", f"\t{URL}\r\n", f"\ufeff{URL}", f"\u200b{URL}\u00a0", f"{URL}\0")
        ),
        ("https://example.com/a\n.png", URL),
        ("https://example.com/my cat.png", "https://example.com/my%20cat.png"),
        ("https://example.com/a.png?q=a b#c d", "https://example.com/a.png?q=a%20b#c%20d"),
        ("HTTPS://EXAMPLE.com/a%20b.png", "HTTPS://EXAMPLE.com/a%20b.png"),
        (" data:image/png;base64,iVBORw0KGgo=\n", "data:image/png;base64,iVBORw0KGgo="),
        ("data:image/png;name=a.png;base64,iVBORw0KGgo=", "data:image/png;name=a.png;base64,iVBORw0KGgo="),
    ],
)
def test_a_url_is_taken_as_it_was_copied(text: str, url: str) -> None:
    assert image_url(text) == url
    assert parse("idefics.caption", {"image": text}).arguments() == {"image": url}
    assert parse("idefics.complete", {"prompt": [text]}).arguments() == {"prompt": [{"image": url}]}


@pytest.mark.parametrize(
    "text", ["https://exam ple.com/a.png", "https:// example.com/a.png", "http://127.0.0.1 .good.test/"]
)
def test_a_blank_in_the_host_is_named(text: str) -> None:
    with pytest.raises(InvalidRequest, match="blank in its host"):
        parse("idefics.caption", {"image": text})


def test_base64_without_its_beginning_is_named() -> None:
    for task, arguments in (("caption", {"image": JPEG}), ("complete", {"prompt": [JPEG]})):
        with pytest.raises(InvalidRequest, match="write data:image/jpeg;base64,"):
            parse(f"idefics.{task}", arguments)


@pytest.mark.parametrize(
    "text",
    [
        "data:image/png,no base64",
        "data:image/png;base64 iVBORw0KGgo=",
        "data:image/ of what",
        "ftp://example.com/a.png",
        "s3://bucket/folder/a.jpg",
        "gs://bucket/a.webp?x=1",
        "file:///srv/a.png",
    ],
)
def test_what_is_meant_as_an_image_never_becomes_text(text: str) -> None:
    with pytest.raises(ImageBlocked):
        parse("idefics.complete", {"prompt": ["Say", text]})
    assert parse("idefics.complete", {"prompt": [{"text": text}]})


@pytest.mark.parametrize(
    "text",
    [
        "https://example.com is a site",
        "https://example.com/a.png\nis a picture",
        "See https://example.com/a.png",
        "Note: a.png",
        "ratio 3://4",
        "data: none",
        "ftp://example.com/",
        "/9j/ is how they begin",
        "",
        " ",
    ],
)
def test_texts_stay_texts(text: str) -> None:
    assert not is_meant_as_image(text)
    job = parse("idefics.complete", {"prompt": [text, URL]})
    assert isinstance(job, Complete)
    assert [type(part) for part in job.prompt] == [TextPart, ImagePart]


@pytest.mark.parametrize(
    "text",
    ["https://" + "a " * 10**5, "data:" + ";" * 10**6, "a" * 10**6, "/9j/" + "a " * 10**6 + "!", "\ufeff" * 10**6],
)
def test_no_text_takes_long(text: str) -> None:
    started = time.thread_time()
    is_meant_as_image(text)
    with contextlib.suppress(ImageBlocked, ValueError):
        image_url(text)
    assert time.thread_time() - started < 0.5
