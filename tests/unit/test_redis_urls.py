"""Redis URLs: the worker and the client read the same, and refuse the same with the cure."""

from __future__ import annotations

import os

import pytest
from celery.backends.redis import RedisBackend, SentinelBackend
from kombu import Connection
from pydantic import ValidationError

from config.celery import configuration
from config.settings import PREFIX, Settings
from tasks import Client
from tasks.redis_urls import results_beside

SECRET = "s3cr3t"


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("broker", "results"),
    [
        ("redis://host", "redis://host/1"),
        ("redis://host/", "redis://host/1"),
        ("redis://host:6379/0", "redis://host:6379/1"),
        (f"redis://user:{SECRET}@host/14", f"redis://user:{SECRET}@host/15"),
        ("rediss://host/0?ssl_cert_reqs=required", "rediss://host/1?ssl_cert_reqs=required"),
    ],
)
def test_results_are_in_the_database_after_the_queues(broker: str, results: str) -> None:
    assert results_beside(broker) == results
    assert Settings(broker_url=broker).result_backend.get_secret_value() == results  # type: ignore[arg-type]
    assert Client(broker).app.conf.result_backend == results


@pytest.mark.parametrize(
    "broker",
    [
        "redis+socket:///run/redis.sock",
        "redis+socket:///run/redis.sock?virtual_host=1",
        "socket:///run/redis.sock",
        f"sentinel://:{SECRET}@a:1;sentinel://b:2/0?master_name=m",
        f"redis://:{SECRET}@a/0;redis://b/0",
        f"redis://:{SECRET}@a;redis://b/0",
        f"redis://:{SECRET}@host/queue",
        f"redis://:{SECRET}@host/0/1",
        f"redis://:{SECRET}@host/-1",
        "redis://host/٣",
        f"redis://:{SECRET}#@host/0",
        f"redis://:{SECRET}/@host/0",
        "redis://host/0?virtual_host=3",
    ],
)
def test_with_another_broker_than_redis_the_results_url_is_asked_for(broker: str) -> None:
    with pytest.raises(ValidationError, match=r"IDEFICS_RESULT_BACKEND is needed|cannot be read") as by_worker:
        Settings(broker_url=broker)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Give result_backend too|cannot be read") as by_client:
        Client(broker)
    assert SECRET not in f"{by_worker.value} {by_client.value}"


@pytest.mark.parametrize(
    ("url", "cure"),
    [
        ("rediss://host/0", "ssl_cert_reqs=required&ssl_ca_certs="),
        ("redis://host/0?ssl_cert_reqs=required", "need rediss://"),
        ("redis://host/0?db=3", "virtual_host=1"),
        ("redis+socket:///run/redis.sock?db=3", "virtual_host=1"),
        ("sentinel://a:1/0", "IDEFICS_SENTINEL_MASTER"),
        ("sentinel://a:1;b:2/0?master_name=m", "each with sentinel://"),
        ("sentinel://a:1;redis://b:2/0?master_name=m", "each with sentinel://"),
        ("sentinel://a:1/0?master_name=m&ssl_cert_reqs=none", "no ssl_cert_reqs"),
        ("sentinel://a:1/0;sentinel://b:2/1?master_name=m", "one database"),
        (f"sentinel://:{SECRET}@a:1/0;sentinel://:other@b:2/0?master_name=m", "one password"),
        ("sentinel://a:1/mymaster", "number of a database|IDEFICS_SENTINEL_MASTER"),
        ("redis://host:port/0", "cannot be read"),
    ],
)
def test_what_celery_would_misread_is_refused_with_the_cure(url: str, cure: str) -> None:
    elsewhere = "redis://host/1"
    with pytest.raises(ValidationError, match=f"broker_url.*{cure}"):
        Settings(broker_url=url, result_backend=elsewhere)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match=f"result_backend.*{cure}"):
        Settings(broker_url=elsewhere, result_backend=url)  # type: ignore[arg-type]
    for urls in ((url, elsewhere), (elsewhere, url)):
        with pytest.raises(ValueError, match=cure) as refused:
            Client(urls[0], result_backend=urls[1])
        assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["redis+socket:///run/redis.sock?virtual_host=2", "socket:///run/redis.sock?virtual_host=2"]
)
def test_a_socket_gets_no_option_of_tcps(url: str) -> None:
    apps = [Client(url, result_backend=url).app]
    for app in apps:
        backend = app.backend
        assert isinstance(backend, RedisBackend)
        assert "socket_keepalive" not in backend.connparams
        assert (backend.connparams["path"], backend.connparams["db"]) == ("/run/redis.sock", 2)
        # Making it tells: redis-py refuses what it does not know.
        backend.client.connection_pool.make_connection()
    settings = configuration(Settings(broker_url=url, result_backend=url), "idefics", 5)  # type: ignore[arg-type]
    assert not settings["redis_socket_keepalive"]
    assert "socket_keepalive" not in settings["broker_transport_options"]
    assert Connection(settings["broker_url"]).transport_cls == "redis"


@pytest.mark.parametrize(
    "url",
    [
        f"sentinel://u:{SECRET}@a:1;sentinel://b:2/3?master_name=m&sentinel_password=to-them",
        f"sentinel://a:1/3?master_name=m;sentinel://u:{SECRET}@b:2?sentinel_password=to-them",
    ],
)
def test_all_sentinels_lead_to_one_database_with_one_password(url: str) -> None:
    of_worker = configuration(Settings(broker_url=url, result_backend=url), "idefics", 5)  # type: ignore[arg-type]
    app = Client(url, result_backend=url).app
    backend = app.backend
    assert isinstance(backend, SentinelBackend)
    assert [(host["host"], host["port"]) for host in backend.connparams["hosts"]] == [("a", 1), ("b", 2)]
    for host in (*backend.connparams["hosts"], backend.connparams):
        assert (host["db"], host["username"], host["password"]) == (3, "u", SECRET)
    assert of_worker["broker_url"] == app.conf.broker_url
    for conf in (of_worker, app.conf):
        for options in (conf["broker_transport_options"], conf["result_backend_transport_options"]):
            assert options["master_name"] == "m"
            assert options["sentinel_kwargs"]["password"] == "to-them"
            assert options["sentinel_kwargs"]["socket_timeout"] > 0


def test_the_masters_name_and_the_sentinels_password_may_be_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDEFICS_BROKER_URL", "sentinel://a:1")
    monkeypatch.setenv("IDEFICS_RESULT_BACKEND", "sentinel://a:1/1")
    monkeypatch.setenv("IDEFICS_SENTINEL_MASTER", "m")
    monkeypatch.setenv("IDEFICS_SENTINEL_PASSWORD", "50%41")
    for conf in (configuration(Settings(), "idefics", 5), Client().app.conf):
        options = conf["broker_transport_options"]
        assert (options["master_name"], options["sentinel_kwargs"]["password"]) == ("m", "50%41")


def test_results_have_one_server() -> None:
    with pytest.raises(ValidationError, match="one server"):
        Settings(result_backend="redis://a/0;redis://b/0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one server"):
        Client("redis://a/0", result_backend="redis://a/0;redis://b/0")
