"""Servers that forbid the use of an image by AI."""

from __future__ import annotations

import ipaddress
from http.server import BaseHTTPRequestHandler

import pytest

from tasks.errors import ImageBlocked
from tests.support.pictures import png
from tests.support.web import Quiet, serving
from worker.images.fetch import Fetcher, FetchPolicy


@pytest.mark.parametrize(
    ("tags", "is_blocked"),
    [
        (["noai"], True),
        (["noindex, NoImageAI"], True),
        (["otherbot: noindex", "noai"], True),
        (["idefics-jobs: noai"], True),
        (["otherbot: noai"], False),
        (["noindex"], False),
        (["noairplanes"], False),
        ([], False),
    ],
)
def test_an_image_that_ai_must_not_use_is_refused_where_that_is_respected(tags: list[str], is_blocked: bool) -> None:
    class Handler(Quiet, BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            for tag in tags:
                self.send_header("X-Robots-Tag", tag)
            self.send_header("Content-Length", str(len(png())))
            self.end_headers()
            self.wfile.write(png())

    networks = (ipaddress.ip_network("127.0.0.0/8"),)
    with serving(Handler) as port:
        url = f"http://127.0.0.1:{port}/a.png"
        assert Fetcher(FetchPolicy(allow_networks=networks, ports=(port,))).fetch(url) == png()
        respectful = Fetcher(FetchPolicy(allow_networks=networks, ports=(port,), respect_noai=True))
        if not is_blocked:
            assert respectful.fetch(url) == png()
            return
        with pytest.raises(ImageBlocked) as blocked:
            respectful.fetch(url)
        assert blocked.value.detail == "noai"
