"""No connection goes where the policy does not allow, and none outlasts its deadline. Seen through the fetcher."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from dataclasses import replace
from ipaddress import ip_network

import pytest

from tasks.errors import ImageBlocked, ImageUnreachable, JobError
from tests.unit.web.servers import BODY, GOOD, LEAVES_S, Resolver, Server, open_files, redirect, within
from worker.images.fetch import Fetcher, FetchPolicy
from worker.net.deadline import Deadline

HOSTILE_URLS = r"""
http://127.0.0.1:{port}/x
http://LOCALHOST:{port}/x
http://127.1:{port}/x
http://2130706433:{port}/x
http://017700000001:{port}/x
http://0x7f.1:{port}/x
http://127.0.0.1.:{port}/x
http://0.0.0.0:{port}/x
http://[::1]:{port}/x
http://[0:0:0:0:0:0:0:1]:{port}/x
http://[::ffff:7f00:1]:{port}/x
http://[::ffff:0:127.0.0.1]:{port}/x
http://[64:ff9b:1::7f00:1]:{port}/x
http://[2001:0:7f00:1::]:{port}/x
http://[fe80::1%25lo]:{port}/x
http://[fd00:ec2::254]:{port}/x
http://[ff02::1]:{port}/x
http://169.254.169.254:{port}/x
http://0xA9FEA9FE:{port}/x
http://[::ffff:169.254.169.254]:{port}/x
http://169.254.170.2:{port}/x
http://168.63.129.16:{port}/x
http://metadata.google.internal:{port}/x
http://172.16.0.1:{port}/x
http://192.168.1.1:{port}/x
http://192.0.2.1:{port}/x
http://198.51.100.1:{port}/x
http://224.0.0.1:{port}/x
http://255.255.255.255:{port}/x
http://localtest.test:{port}/x
http://multi2.test:{port}/x
http://cgnat.test:{port}/x
http://①②⑦.⓪.⓪.①:{port}/x
http://%31%32%37.0.0.1:{port}/x
http://good.test:{port}@127.0.0.1:{port}/x
http://127.0.0.1:{port}\@good.test:{port}/
http://good.test:{port}#@127.0.0.1:{port}/
http://127.0.0.1:{port}?@good.test:{port}/
http:127.0.0.1:{port}/
http://127.0.0.1:{port} .good.test/
http://127.0.0.1:{port}%00.good.test/
HTTP://127.0.0.1:{port}/
http://[good.test]:{port}/
http://2130706433.:{port}/x
http://0x7f000001:{port}/x
http://0x7F.0x0.0x0.0x1:{port}/x
http://0177.0.0.1:{port}/x
http://00000177.0.0.1:{port}/x
http://0177.0x0.0.1:{port}/x
http://127.0.1:{port}/x
http://127.65793:{port}/x
http://127.00.00.01:{port}/x
http://127.0.0.1..:{port}/x
http://0.0.0.1:{port}/x
http://0x0:{port}/x
http://00:{port}/x
http://localhost.:{port}/x
http://LocalHost..:{port}/x
http://localhost.localdomain:{port}/x
http://ip6-localhost:{port}/x
http://ip6-loopback:{port}/x
http://foo.localhost:{port}/x
http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ:{port}/x
http://ｌｏｃａｌｈｏｓｔ:{port}/x
http://loc%61lhost:{port}/x
http://loc{hyphen}alhost:{port}/x
http://１２７.０.０.１:{port}/x
http://127．0．0．1:{port}/x
http://127｡0｡0｡1:{port}/x
http://²¹³⁰⁷⁰⁶⁴³³:{port}/x
http://𝟙𝟚𝟟.𝟘.𝟘.𝟙:{port}/x
http://[::ffff:127.0.0.1]:{port}/x
http://[::FFFF:7F00:0001]:{port}/x
http://[0000:0000:0000:0000:0000:ffff:7f00:0001]:{port}/x
http://[::ffff:0.0.0.0]:{port}/x
http://[::7f00:1]:{port}/x
http://[0::1]:{port}/x
http://[::0001]:{port}/x
http://[::1%251]:{port}/x
http://[::1%eth0]:{port}/x
http://[::1].:{port}/x
http://[[::1]]:{port}/x
http://[2001:db8::1]:{port}/x
http://[fe80::a9fe:a9fe]:{port}/x
http://[::ffff:a9fe:a9fe]:{port}/x
http://[64:ff9b::a9fe:a9fe]:{port}/x
http://[2002:a9fe:a9fe::]:{port}/x
http://[fd20:ce::254]:{port}/x
http://2852039166:{port}/latest/meta-data/
http://0251.0376.0251.0376:{port}/x
http://0251.254.169.254:{port}/x
http://169.254.43518:{port}/x
http://169.254.169.254.:{port}/x
http://metadata:{port}/x
http://metadata.google.internal.:{port}/x
http://METADATA.google.INTERNAL:{port}/computeMetadata/v1/
http://instance-data.ec2.internal:{port}/x
http://169.254.169.254.nip.test:{port}/x
http://169.254.170.23:{port}/x
http://169.254.0.23:{port}/x
http://100.88.222.5:{port}/x
http://127.0.0.1:{port}@good.test:{port}/ok
http://good.test@127.0.0.1:{port}/x
http://good.test%40127.0.0.1:{port}/x
http://user:good.test@[::1]:{port}/x
http://127.0.0.1:{port}#good.test
http://127.0.0.1:{port}#@good.test/
http://127.0.0.1:{port}/#http://good.test:{port}/ok
http://127.0.0.1:{port}%23@good.test:{port}/
http://127.0.0.1:{port}%2f.good.test:{port}/
http://127.0.0.1:{port};good.test/
http://127.0.0.1\t:{port}/x
http://127.0.0.1:{port}:{port}/x
http://127.0.0.1:0{port}/x
http://127.0.0.1:+{port}/x
http://127.0.0.1: {port}/x
http:/127.0.0.1:{port}/x
http:///127.0.0.1:{port}/x
http:\\127.0.0.1:{port}\x
hTTp://127.0.0.1:{port}/x
FILE:///etc/passwd
gopher://127.0.0.1:6379/_INFO
data:text/plain,hi
unix:///var/run/x
ldap://127.0.0.1/
http://good.test:22/
http://good.test:0/
http://good.test:-1/
http:///
http://good.test:{port}/redir/687474703a2f2f3132372e302e302e313a383030302f72
http://good.test:{port}/redir/66696c653a2f2f2f6574632f706173737764
http://good.test:{port}/redir/687474703a2f2f676f6f642e746573743a38303030403132372e302e302e313a383030302f
http://good.test:{port}/redir/687474703a2f2f676f6f642e746573743a32322f
http://good.test:{port}/loop

http://[::]:{port}/x
http://[::127.0.0.1]:{port}/x
http://[64:ff9b::127.0.0.1]:{port}/x
http://[2002:7f00:1::]:{port}/x
http://[fec0::1]:{port}/x
http://[::1%25lo]:{port}/x
http://127.0.0.1
http://0177.0.0.01:{port}/x
http://0:{port}/x
http://127.255.255.254:{port}/x
http://10.0.0.1:{port}/x
http://100.100.100.200:{port}/x
http://192.0.0.192:{port}/x
http://mapped.test:{port}/x
http://sixth.test:{port}/x
http://user@good.test:{port}/ok
http://user:password@good.test:{port}/ok
http://@good.test:{port}/ok
http://good.test:{port}\ok
http://good.test:{port}/ok{tab}
http://good.test{colon}{port}/ok
http://127。0。0。1:{port}/x
http://[::1]@good.test:{port}/ok
http://a..b:{port}/x
//good.test:{port}/ok
good.test:{port}/ok
ftp://good.test:{port}/ok
javascript:alert(1)
blob:http://good.test:{port}/ok
view-source:http://127.0.0.1:{port}/
data:image/svg+xml,<svg/>
data:image/png,hi
""".strip().splitlines()  # noqa: RUF001 - digits and letters that only look like others


def test_no_hostile_url_and_no_redirect_to_one_reaches_a_canary(
    fetcher: Fetcher, good: Server, canaries: list[Server], capsys: pytest.CaptureFixture[str]
) -> None:
    for canary in canaries:
        canary.hits = 0
    signs = {"port": good.port, "tab": "\t", "colon": "\uff1a", "hyphen": "\u00ad"}
    direct = [url.format(**signs) for url in HOSTILE_URLS if url]
    targets = [url for url in direct if "good.test" not in url]
    redirected = [f"http://good.test:{good.port}{redirect(target)}" for target in targets]
    wrong = [(url, end) for url in direct if (end := _end(fetcher, url)) != "image_blocked"]
    # A redirect that names no URL at all is the server's fault.
    wrong += [
        (target, end)
        for target, url in zip(targets, redirected, strict=True)
        if (end := _end(fetcher, url)) not in ("image_blocked", "image_invalid")
    ]
    hits = {canary.address: canary.hits for canary in canaries}
    with capsys.disabled():
        print(f"\n{len(direct)} hostile URLs and {len(redirected)} redirects to such tried, canaries reached: {hits}")
    assert wrong == []
    assert set(hits.values()) == {0}
    assert len(set(direct)) > 110


def _end(fetcher: Fetcher, url: str) -> str:
    try:
        fetcher.fetch(url)
    except JobError as error:
        return error.code
    return "read"


def test_the_canary_can_be_reached_when_its_network_is_allowed(
    policy: FetchPolicy, good: Server, canaries: list[Server]
) -> None:
    open_to_all = replace(policy, allow_networks=(ip_network("127.0.0.0/8"), ip_network("::1")))
    for canary, host in zip(canaries, ("127.0.0.1", "[::1]"), strict=False):
        hits = canary.hits
        assert Fetcher(open_to_all).fetch(f"http://{host}:{good.port}/ok") == BODY
        assert canary.hits == hits + 1


def test_a_name_is_looked_up_once_so_it_cannot_be_rebound(
    fetcher: Fetcher, good: Server, canaries: list[Server], resolver: Resolver
) -> None:
    hits = [canary.hits for canary in canaries]
    assert fetcher.fetch(f"http://rebind.test:{good.port}/ok") == BODY
    assert resolver.asked.count("rebind.test") == 1
    with pytest.raises(ImageBlocked):
        fetcher.fetch(f"http://rebind.test:{good.port}/ok")
    assert [canary.hits for canary in canaries] == hits


def test_a_name_rebound_between_redirects_is_refused(fetcher: Fetcher, good: Server, canaries: list[Server]) -> None:
    hits = [canary.hits for canary in canaries]
    with pytest.raises(ImageBlocked):
        fetcher.fetch(f"http://rebind.test:{good.port}/hops/1")
    assert [canary.hits for canary in canaries] == hits


def test_an_unknown_or_empty_name_is_retryable(fetcher: Fetcher, good: Server) -> None:
    for host in ("unknown.test", "empty.test"):
        with pytest.raises(ImageUnreachable, match=f"{host} has no address"):
            fetcher.fetch(f"http://{host}:{good.port}/ok")


def test_a_link_local_answer_with_a_zone_is_refused(fetcher: Fetcher, good: Server) -> None:
    with pytest.raises(ImageBlocked):
        fetcher.fetch(f"http://linklocal.test:{good.port}/ok")


def test_only_allowed_domains_and_their_sub_domains_are_read(policy: FetchPolicy, good: Server) -> None:
    fetcher = Fetcher(replace(policy, allow_domains=("Good.test", "other.test")))
    for host in ("good.test", "WWW.good.test", "good.test."):
        assert fetcher.fetch(f"http://{host}:{good.port}/ok") == BODY
    for host in ("notgood.test", GOOD, "test", "good.test.evil.test"):
        with pytest.raises(ImageBlocked, match="domain"):
            fetcher.fetch(f"http://{host}:{good.port}/ok")


def test_a_redirect_out_of_the_allowed_domains_is_refused(policy: FetchPolicy, good: Server) -> None:
    fetcher = Fetcher(replace(policy, allow_domains=("good.test",)))
    with pytest.raises(ImageBlocked, match="domain"):
        fetcher.fetch(f"http://good.test:{good.port}{redirect(f'http://notgood.test:{good.port}/ok')}")


def test_port_zero_does_not_become_the_default_port(policy: FetchPolicy) -> None:
    with pytest.raises(ImageBlocked, match="port"):
        Fetcher(policy).fetch("http://good.test:0/")


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\n\r\n" + BODY])
def test_the_watchdog_ends_what_no_timeout_ends(
    hasty: FetchPolicy, start: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As TLS tickets without end do: they are read within one call.
    monkeypatch.setattr(Deadline, "left", lambda deadline, at_most: 60.0)

    def stall(connection: socket.socket, path: str) -> None:
        connection.sendall(start)
        time.sleep(LEAVES_S)

    with Server(GOOD, answer=stall) as server:
        fetcher = Fetcher(replace(hasty, ports=(server.port,)))
        with within(LEAVES_S), pytest.raises(ImageUnreachable, match="seconds"):
            fetcher.fetch(f"http://good.test:{server.port}/")


def test_a_refused_connection_is_retryable(policy: FetchPolicy) -> None:
    with Server(GOOD) as gone:
        pass
    with pytest.raises(ImageUnreachable, match="could not be reached"):
        Fetcher(replace(policy, ports=(gone.port,))).fetch(f"http://good.test:{gone.port}/ok")


def test_a_full_backlog_leaves_within_the_deadline(hasty: FetchPolicy) -> None:
    with socket.create_server((GOOD, 0), backlog=0) as listener:
        target = listener.getsockname()
        with socket.create_connection(target), socket.socket() as second:
            second.setblocking(False)
            second.connect_ex(target)
            with within(LEAVES_S), pytest.raises(ImageUnreachable, match="did not"):
                Fetcher(replace(hasty, ports=(target[1],))).fetch(f"http://good.test:{target[1]}/ok")


def test_a_slow_look_up_leaves_within_the_deadline(
    hasty: FetchPolicy, good: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(6))
    with within(LEAVES_S), pytest.raises(ImageUnreachable):
        Fetcher(hasty).fetch(f"http://good.test:{good.port}/ok")


def test_no_thread_and_no_descriptor_stays_behind(fetcher: Fetcher, good: Server) -> None:
    urls = [
        f"http://good.test:{good.port}{path}" for path in ("/ok", "/status/404", "/loop", "/hostile/11", "/hostile/17")
    ]
    for count in itertools.count():
        before = _descriptors()
        for url in urls:
            _end(fetcher, url)
        time.sleep(0.1)
        if _descriptors() <= before:
            return
        assert count < 10


def _descriptors() -> int:
    return open_files() + threading.active_count()
