"""Hosts that ask for a pause (Retry-After): no further image of theirs is asked for before it is over."""

from __future__ import annotations

import ipaddress
from http.server import BaseHTTPRequestHandler

import pytest

from tasks.errors import ImageUnreachable
from tests.support.web import Quiet, serving
from worker.images.fetch import FetchPolicy
from worker.images.host_limits import HostLimitReached
from worker.images.sources import SourceReader


@pytest.mark.parametrize(("asked_for", "most_s", "pause_s"), [("60", 300.0, 60.0), ("100000", 30.0, 30.0)])
def test_a_host_that_sends_retry_after_is_left_alone(asked_for: str, most_s: float, pause_s: float) -> None:
    asked: list[str] = []

    class Handler(Quiet, BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(429)
            self.send_header("Retry-After", asked_for)
            self.send_header("Content-Length", "0")
            self.end_headers()

    with serving(Handler) as port:
        networks = (ipaddress.ip_network("127.0.0.0/8"),)
        reader = SourceReader(FetchPolicy(allow_networks=networks, ports=(port,), retry_after_max_s=most_s))
        with pytest.raises(ImageUnreachable):
            reader.read(f"http://127.0.0.1:{port}/1.png")
        with pytest.raises(HostLimitReached) as reached:
            reader.read(f"http://127.0.0.1:{port}/2.png", wait_s=5)
    assert asked == ["/1.png"]
    assert reached.value.countdown == pytest.approx(pause_s + 1, abs=2)
