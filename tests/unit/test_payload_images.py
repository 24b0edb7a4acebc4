"""Images in payloads."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tasks.errors import ImageBlocked, ImageInvalid, JobError
from tasks.payloads import Caption, parse
from tests.support.payloads import LEAST, URL, refusal


@pytest.mark.parametrize(
    "image",
    [
        URL,
        "http://example.com/a",
        "HTTPS://example.com",
        "data:image/webp;base64,UklGRgAAAABXRUJQ",
        {"path": "a/b.jpg"},
    ],
)
def test_an_image_is_a_url_a_data_uri_or_a_path(image: Any) -> None:
    assert parse("idefics.caption", {"image": image}).arguments()["image"] == image


@pytest.mark.parametrize("image", ["file:///etc/passwd", "ftp://example.com/a.jpg", "gopher://x", "data:text/html,x"])
def test_another_scheme_is_blocked_everywhere(image: str) -> None:
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": image}}]}
    for task, arguments in [
        ("idefics.caption", {"image": image}),
        ("idefics.caption", {"examples": [{"image": image, "text": "a"}]}),
        ("idefics.answer", {"image": image}),
        ("idefics.classify", {"image": image}),
        ("idefics.write", {"images": [URL, image]}),
        ("idefics.complete", {"prompt": [{"image": image}]}),
        ("idefics.chat", {"messages": [message]}),
    ]:
        with pytest.raises(ImageBlocked):
            parse(task, {**LEAST[task], **arguments})


@pytest.mark.parametrize(
    ("task", "arguments", "told"),
    [
        ("caption", {"callback": {"url": "localhost/hook", "key_id": "k"}}, "callback.url: write https://host/path"),
        ("caption", {"callback": {"url": "ftp://a.example", "key_id": "k"}}, "callback.url: write https://host/path"),
        ("caption", {"callback": {"url": 5, "key_id": "k"}}, "callback.url: Input should be a valid string"),
        ("classify", {"labels": ["a\nb", "c"]}, "labels.0: a label is one line without control characters"),
        ("chat", {"messages": [{"role": "user", "content": 5}]}, "messages.0.content: Input should be a valid string"),
        ("chat", {"messages": [5]}, "messages.0: "),
        ("complete", {"prompt": [5]}, "prompt.0: a part is a string"),
        ("complete", {"prompt": "a"}, "prompt: Input should be a valid list"),
    ],
)
def test_no_message_is_a_pattern_or_of_the_insides(task: str, arguments: Any, told: str) -> None:
    message = refusal(f"idefics.{task}", **arguments)
    assert told in message
    assert not re.search(r"pattern|\^|<union>|discriminator|lambda", message)


@pytest.mark.parametrize(
    ("image", "error", "detail"),
    [
        *((url, ImageBlocked, "url") for url in ("http://", "http://[::1/", "http://u:p@host/", "https:///a.png")),
        *(
            (url, ImageBlocked, "url")
            for url in ("https://a:b/", "https://a..b/", "https://%61/", "http://[::1%25lo]/")
        ),
        *((f"https://{it}", ImageBlocked, "url") for it in ("a.example#@b", "a.example\\@b", "a\x01b", "a" * 9_999)),
        ("https://a.example:0/", ImageBlocked, "port"),
        ({"path": "/etc/passwd"}, ImageBlocked, "path"),
        ({"path": "a/../../b"}, ImageBlocked, "path"),
        ({"path": "a\0"}, ImageBlocked, "path"),
        *(
            (f"data:image/png;base64,{data}", ImageInvalid, "data_uri")
            for data in ("%%%", "a", "iVBORw0KGgo=é", "!!!!")
        ),
        *((f"data:image/png;base64,{data}", ImageInvalid, "not_a_picture") for data in ("aGVsbG8=", "", "JVBERi0x")),
        ("data:image/heic;base64,AAAAGGZ0eXBoZWlj", ImageInvalid, "not_a_picture"),
    ],
)
def test_what_can_be_known_of_an_image_before_it_is_sent_is_known_then(
    image: Any, error: type[JobError], detail: str
) -> None:
    with pytest.raises(error) as told:
        parse("idefics.caption", {"image": image})
    assert told.value.detail == detail
    assert "IDEFICS" not in str(told.value)
    with pytest.raises(error):
        Caption(image=image)


@pytest.mark.parametrize(
    "image",
    [
        "http://127.0.0.1/a.png",
        "http://[::1]:81/a.png",
        "https://bücher.example/ä.png",
        "https://a_b.example.:8443/p?q=a@b#c",
        "https://a.example/%zz",
    ],
)
def test_what_an_operator_may_allow_is_left_to_the_worker(image: str) -> None:
    assert parse("idefics.caption", {"image": image})


def test_of_a_large_picture_only_the_beginning_is_decoded() -> None:
    start = "data:image/png;base64,iVBORw0KGgoA"
    for end in ("", "!", "%"):
        assert parse("idefics.caption", {"image": start + "AAAA" * 10**6 + end})
    for broken in ("!", "é"):
        with pytest.raises(ImageInvalid):
            parse("idefics.caption", {"image": start + broken + "AAAA" * 10**6})
    # An escape where the beginning ends.
    for cut in range(6):
        assert parse("idefics.caption", {"image": start + "A" * cut + "%0A" * 10**5})


@pytest.mark.parametrize("image", ["a/b.jpg", "/etc/passwd", "../a.jpg", "", "//example.com/a.jpg", 5, None, [URL], {}])
def test_anything_else_is_no_image_and_the_message_says_what_is(image: Any) -> None:
    assert "data:image/" in refusal("idefics.caption", image=image)
