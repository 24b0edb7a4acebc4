"""One image's download: redirects, statuses, sizes, and messages that hold no secret."""

from __future__ import annotations

import io
import logging
import os
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from PIL import Image

from config.settings import Settings
from tasks.errors import ImageBlocked, ImageInvalid, ImageTooLarge, ImageUnreachable, JobError
from tests.unit.web.servers import BODY, GOOD, MAX_BYTES, Server, redirect, response
from worker.images import fetch
from worker.images.decode import FORMATS
from worker.images.fetch import Fetcher, FetchPolicy, requested_host

SECRET = "s3cr3t-token"


def test_the_good_server_is_read(fetcher: Fetcher, good: Server) -> None:
    for path in ("/ok", "/ok?a=b@c", "/chunked", "/ok#fragment", "/ok/x@y/z"):
        assert fetcher.fetch(f"http://good.test:{good.port}{path}") == BODY


@pytest.mark.parametrize("most", [0, 3, 5])
def test_no_more_redirects_are_followed_than_allowed(most: int, policy: FetchPolicy, good: Server) -> None:
    fetcher = Fetcher(replace(policy, max_redirects=most))
    assert fetcher.fetch(f"http://good.test:{good.port}/hops/{most}") == BODY
    with pytest.raises(ImageBlocked, match=f"more than {most} redirects"):
        fetcher.fetch(f"http://good.test:{good.port}/hops/{most + 1}")


def test_five_redirects_are_the_default() -> None:
    assert FetchPolicy().max_redirects == Settings().image_max_redirects == 5


def test_a_redirect_may_hold_spaces_and_change_the_host(fetcher: Fetcher, good: Server) -> None:
    target = f"http://www.good.test:{good.port}/ok/a b"
    assert fetcher.fetch(f"http://good.test:{good.port}{redirect(target)}") == BODY
    assert "GET /ok/a%20b " in good.heads[-1]


def test_a_redirects_target_is_read_as_utf_8(fetcher: Fetcher, good: Server) -> None:
    assert fetcher.fetch(f"http://good.test:{good.port}{redirect('/ok/café')}") == BODY
    assert "GET /ok/caf%C3%A9 " in good.heads[-1]


@pytest.mark.parametrize(
    "answer",
    [
        response(status="203 Non-Authoritative Information"),
        *(
            response(Content_Encoding=label)
            for label in ("utf-8", "UTF-8", "binary", "none", "", "identity", "8bit", "base64")
        ),
    ],
)
def test_content_encodings_that_change_no_byte_are_ignored(answer: bytes, policy: FetchPolicy) -> None:
    with Server(GOOD, answer=lambda connection, _: connection.sendall(answer)) as server:
        fetcher = Fetcher(replace(policy, ports=(server.port,)))
        assert fetcher.fetch(f"http://good.test:{server.port}/") == BODY


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_that_is_opened_is_read(form: str, policy: FetchPolicy) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (1, 1)).save(picture, form)
    body = picture.getvalue()
    with Server(GOOD, answer=lambda c, _: c.sendall(response(body))) as server:
        fetcher = Fetcher(replace(policy, ports=(server.port,)))
        assert fetcher.fetch(f"http://good.test:{server.port}/x") == body


def test_large_bodies_share_one_rate_and_arrive(policy: FetchPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "LARGE_BYTES", 50_000)
    monkeypatch.setattr(fetch, "LARGE_BYTES_PER_S", 200_000 / (os.cpu_count() or 1))
    body = BODY.ljust(MAX_BYTES, b"x")
    with Server(GOOD, answer=lambda c, _: c.sendall(response(body))) as server:
        fetcher = Fetcher(replace(policy, ports=(server.port,), total_s=0.5))
        began = time.monotonic()
        with ThreadPoolExecutor(4) as threads:
            bodies = list(threads.map(fetcher.fetch, [f"http://good.test:{server.port}/x"] * 4))
    assert bodies == [body] * 4
    # The half of each that is beyond, which counts for no server's deadline.
    assert time.monotonic() - began > 0.8


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 408])
def test_a_transient_status_is_retryable_and_requested_once(status: int, fetcher: Fetcher, good: Server) -> None:
    hits = good.hits
    with pytest.raises(ImageUnreachable) as failure:
        fetcher.fetch(f"http://good.test:{good.port}/status/{status}")
    assert failure.value.retryable
    assert good.hits == hits + 1


@pytest.mark.parametrize("status", [503, 429])
def test_retry_after_reaches_the_error(status: int, fetcher: Fetcher, good: Server) -> None:
    with pytest.raises(ImageUnreachable) as failure:
        fetcher.fetch(f"http://good.test:{good.port}/status/{status}")
    assert failure.value.retry_after_s == 1


def test_the_operators_address_is_in_the_user_agent(policy: FetchPolicy, good: Server) -> None:
    Fetcher(replace(policy, contact="https://me.test/bot")).fetch(f"http://good.test:{good.port}/ok")
    assert "(+image fetcher; https://me.test/bot)\r\n" in good.heads[-1]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 204, 206, 300, 304])
def test_a_permanent_status_is_not_retryable(status: int, fetcher: Fetcher, good: Server) -> None:
    with pytest.raises(ImageInvalid, match=str(status)) as failure:
        fetcher.fetch(f"http://good.test:{good.port}/status/{status}")
    assert not failure.value.retryable
    assert failure.value.args[2:] == (f"http_{status}",)


def test_the_detail_of_a_failure_names_its_cause(policy: FetchPolicy, good: Server) -> None:
    fetcher = Fetcher(replace(policy, max_bytes=100))
    base = f"http://good.test:{good.port}"
    with Server(GOOD) as gone:
        pass
    urls = {
        "http_404": f"{base}/status/404",
        "http_410": f"{base}/status/410",
        "http_503": f"{base}/status/503",
        "redirects": f"{base}/hops/9",
        "port": "http://good.test:25/",
        "dns": f"http://unknown.test:{good.port}/",
        "url": "http://user@good.test/",
        "bytes": f"{base}/ok",
        "network": f"http://127.0.0.1:{good.port}/",
    }
    for detail, url in urls.items():
        with pytest.raises(JobError) as failure:
            fetcher.fetch(url)
        assert failure.value.detail == detail
    with pytest.raises(ImageUnreachable) as failure:
        Fetcher(replace(policy, ports=(gone.port,))).fetch(f"http://good.test:{gone.port}/ok")
    assert failure.value.detail == "connection"


def test_a_refusal_names_the_setting_that_would_allow_it_and_nothing_of_the_url(
    policy: FetchPolicy, good: Server
) -> None:
    base = f"http://good.test:{good.port}/s3cret"
    for setting, url, changed in [
        ("IDEFICS_IMAGE_PORTS", "http://good.test:25/s3cret", policy),
        ("IDEFICS_IMAGE_ALLOW_DOMAINS", base, replace(policy, allow_domains=("a.test",))),
        ("IDEFICS_IMAGE_ALLOW_NETWORKS", f"http://127.0.0.1:{good.port}/s3cret", policy),
        ("IDEFICS_IMAGE_MAX_BYTES", f"http://good.test:{good.port}/ok?s3cret", replace(policy, max_bytes=10)),
    ]:
        with pytest.raises(JobError, match=setting) as refused:
            Fetcher(changed).fetch(url)
        assert "s3cret" not in str(refused.value)


def test_an_image_of_exactly_the_cap_is_read(policy: FetchPolicy, good: Server) -> None:
    url = f"http://good.test:{good.port}"
    exact, less = (Fetcher(replace(policy, max_bytes=len(BODY) - spare)) for spare in (0, 1))
    for path in ("/ok", "/chunked"):
        assert exact.fetch(url + path) == BODY
        with pytest.raises(ImageTooLarge):
            less.fetch(url + path)


def test_many_threads_share_a_fetcher(fetcher: Fetcher, good: Server) -> None:
    with ThreadPoolExecutor(16) as threads:
        bodies = list(threads.map(fetcher.fetch, [f"http://good.test:{good.port}/ok"] * 64))
    assert bodies == [BODY] * 64


LEAKS = [
    "/status/404?t={secret}",
    "/status/503/{secret}",
    "/hostile/5?t={secret}",
    "/hostile/7?t={secret}",
    "/hostile/16?t={secret}",
    "/hostile/17?t={secret}",
    "/hostile/19?t={secret}",
    "/loop?t={secret}",
    "/redir/not-hex?t={secret}",
]


@pytest.mark.parametrize("path", LEAKS)
def test_no_message_traceback_or_log_holds_the_rest_of_a_url(
    path: str, hasty: FetchPolicy, good: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    error = _outcome(Fetcher(hasty), f"http://good.test:{good.port}{path.format(secret=SECRET)}")
    assert isinstance(error, JobError)
    assert "good.test" in str(error)
    assert str(error).endswith(".")
    assert SECRET not in "".join(traceback.format_exception(error)) + caplog.text


@pytest.mark.parametrize(
    "url",
    [
        f"http://{SECRET}@good.test/",
        f"http://me:{SECRET}@good.test/",
        f"http://127.0.0.1/{SECRET}",
        f"ftp://good.test/{SECRET}",
        f"http://unknown.test/?{SECRET}",
        f"http://good.test:99999/?{SECRET}",
        f"http://[{SECRET}]/",
        f"http://good.test/{SECRET} ",
        "http://good.test/" + SECRET * 1000,
    ],
)
def test_no_refusal_holds_a_secret(url: str, fetcher: Fetcher) -> None:
    error = _outcome(fetcher, url)
    assert isinstance(error, JobError)
    assert SECRET not in "".join(traceback.format_exception(error))


def _outcome(fetcher: Fetcher, url: str) -> bytes | JobError:
    try:
        return fetcher.fetch(url)
    except JobError as error:
        return error


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://Example.com./a", "example.com"),
        ("https://b\u00fccher.example/a", "xn--bcher-kva.example"),
        ("http://ex%61mple.com/", "example.com"),
        ("http://[::1]:80/", "::1"),
        ("http://a b/", ""),
    ],
)
def test_a_limit_applies_to_the_host_that_will_be_asked(url: str, host: str) -> None:
    assert requested_host(url) == host
