"""TLS with client certificates as config/redis/secrets.sh makes them, from the URLs that it writes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
from kombu.exceptions import OperationalError

from tasks import Client, Complete
from tests.support.guarded import binaries, environment, has_tls, make_secrets, tls_proxy
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack

HELLO = Complete(prompt=["Hello"], max_new_tokens=3)


@dataclass(frozen=True)
class Encrypted:
    """A server behind TLS."""

    secrets: Path
    port: int

    def urls(self, user: str, host: str = "localhost") -> dict[str, str]:
        found = environment(self.secrets, user)
        return {name: url.replace("@redis:6379", f"@{host}:{self.port}") for name, url in found.items()}

    def broker_url(self, user: str = "producer", host: str = "localhost") -> str:
        return self.urls(user, host)["IDEFICS_BROKER_URL"]


@contextmanager
def _own_tls(binary: str, secrets: Path, folder: Path) -> Iterator[int]:
    """The server's own, by compose's options."""
    port = stack.free_port()
    files = secrets / "redis"
    command = [binary, "--port", "0", "--tls-port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    command += ["--tls-cert-file", f"{files}/tls.crt", "--tls-key-file", f"{files}/tls.key"]
    command += ["--tls-ca-cert-file", f"{files}/ca.crt", "--tls-auth-clients", "yes", "--save", ""]
    command += ["--aclfile", f"{files}/users.acl"]
    with stack.started(command, log=folder / "log") as process:
        stack.await_line(process, folder / "log", "eady to accept connections", PATIENCE_S)
        yield port


@contextmanager
def _proxied(binary: str, secrets: Path) -> Iterator[int]:
    """For a server that was built without TLS."""
    acl = secrets / "redis" / "users.acl"
    with stack.broker("--aclfile", str(acl), binary=binary) as server, tls_proxy(server.port, secrets) as port:
        yield port


@pytest.fixture(scope="module", params=binaries(), ids=lambda binary: Path(binary).name)
def encrypted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encrypted]:
    folder = tmp_path_factory.mktemp("tls")
    secrets = make_secrets(folder / "secrets", "redis", "other.example", "10.0.0.1")
    if has_tls(request.param):
        with _own_tls(request.param, secrets, folder) as port:
            yield Encrypted(secrets, port)
    else:
        with _proxied(request.param, secrets) as port:
            yield Encrypted(secrets, port)


def test_a_job_goes_through_tls_from_the_client_to_the_worker_and_back(encrypted: Encrypted, tmp_path: Path) -> None:
    log = tmp_path / "log"
    bare = {name: value for name, value in os.environ.items() if not name.startswith("IDEFICS_")}
    settings = bare | {"IDEFICS_MODEL": "fake"} | encrypted.urls("worker")
    command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker"]
    with stack.started(command, log=log, environment=settings) as process:
        stack.await_line(process, log, " ready.", stack.WORKER_START_S)
        job = Client(encrypted.broker_url()).submit(HELLO, priority=9)
        assert job.result(PATIENCE_S).text == "llo"
        canceled = Client(encrypted.broker_url()).submit(HELLO)
        canceled.cancel()
        eventually(lambda: canceled.async_result.ready())


def test_a_client_without_a_certificate_is_refused(encrypted: Encrypted) -> None:
    bare = encrypted.broker_url().partition("&ssl_certfile")[0]
    with pytest.raises((redis.ConnectionError, OSError)):
        redis.Redis.from_url(bare).ping()


def test_a_client_with_anothers_certificate_is_refused(encrypted: Encrypted, tmp_path: Path) -> None:
    stranger = make_secrets(tmp_path / "stranger") / "producer"
    url = encrypted.broker_url()
    for file in ("tls.crt", "tls.key"):
        url = url.replace(str(encrypted.secrets / "producer" / file), str(stranger / file))
    with pytest.raises((redis.ConnectionError, OSError)):
        redis.Redis.from_url(url).ping()


def test_a_certificate_is_no_password(encrypted: Encrypted) -> None:
    scheme, _, rest = encrypted.broker_url().partition("://")
    with pytest.raises(redis.AuthenticationError):
        redis.Redis.from_url(f"{scheme}://{rest.partition('@')[2]}").ping()


def test_a_server_with_anothers_certificate_gets_no_password(encrypted: Encrypted, tmp_path: Path) -> None:
    stranger = make_secrets(tmp_path / "stranger") / "ca.crt"
    url = encrypted.broker_url().replace(str(encrypted.secrets / "producer" / "ca.crt"), str(stranger))
    with pytest.raises(ConnectionError):
        Client(url).ping()


def test_a_server_by_another_name_is_not_believed(encrypted: Encrypted) -> None:
    # 127.0.0.2 is this machine too, and not in the certificate; 127.0.0.1 is.
    assert redis.Redis.from_url(encrypted.broker_url(host="127.0.0.1")).ping()
    with pytest.raises((redis.ConnectionError, OperationalError, ConnectionError)):
        Client(encrypted.broker_url(host="127.0.0.2")).ping()
