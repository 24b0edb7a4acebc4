"""A client's own app, an app of the producer's, and URLs."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from celery import Celery, current_app

from tasks import Caption, Client, Complete, ImageBlocked
from tests.unit.client.messages import JOB, RESULTS, only


def test_an_app_of_yours_serves_as_it_is() -> None:
    app = Celery("backend", broker="memory://", backend=RESULTS, set_as_current=False)
    client = Client(app=app, queue=uuid.uuid4().hex)
    assert client.app is app
    submitted = client.submit(JOB)
    assert only(client).headers["id"] == submitted.id


def test_an_app_of_yours_that_pickles_sends_its_jobs_as_json_all_the_same() -> None:
    app = Celery("backend", broker="memory://", backend=RESULTS, set_as_current=False)
    app.conf.task_serializer = "pickle"
    client = Client(app=app, queue=uuid.uuid4().hex)
    client.submit(JOB)
    assert only(client).content_type == "application/json"


@pytest.mark.parametrize("urls", [{"broker_url": "memory://"}, {"result_backend": RESULTS}])
def test_an_app_and_a_url_are_refused_together(urls: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="not both"):
        Client(app=Celery(set_as_current=False), **urls)


def test_without_a_url_the_worker_is_on_this_machine() -> None:
    conf = Client().app.conf
    assert (conf.broker_url, conf.result_backend) == ("redis://localhost:6379/0", "redis://localhost:6379/1")


def test_the_environment_names_the_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDEFICS_BROKER_URL", "redis://queue/4")
    assert Client().app.conf.broker_url == "redis://queue/4"
    assert Client().app.conf.result_backend == "redis://queue/5"
    monkeypatch.setenv("IDEFICS_RESULT_BACKEND", "redis://results/0")
    assert Client().app.conf.result_backend == "redis://results/0"


def test_the_variables_of_a_sites_own_celery_lead_the_client_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.setenv(name, "redis://elsewhere/7")
    app = Client("redis://queue/4").app
    assert {app.connection_for_write().hostname, app.connection_for_read().hostname} == {"queue"}
    assert app.backend.connparams["host"] == "queue"


def test_a_url_that_is_given_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDEFICS_BROKER_URL", "redis://queue/4")
    monkeypatch.setenv("IDEFICS_RESULT_BACKEND", "redis://results/0")
    conf = Client("redis://other/2").app.conf
    assert (conf.broker_url, conf.result_backend) == ("redis://other/2", "redis://other/3")


@pytest.mark.parametrize("url", ["memory://", "amqp://host//", "sentinel://host:26379/0?master_name=m"])
def test_another_broker_needs_a_result_backend(url: str) -> None:
    with pytest.raises(ValueError, match="result_backend"):
        Client(url)


@pytest.mark.parametrize("url", ["redis://a/0;redis://:s3cret@b/0", "redis://:s3/cret@host/0"])
def test_a_url_without_the_number_of_a_database_needs_one_and_is_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match=r"result_backend|cannot be read") as refused:
        Client(url)
    assert "cret" not in str(refused.value)


def test_the_clients_own_app_gives_a_frozen_server_up() -> None:
    conf = Client("redis://host/0").app.conf
    assert conf.broker_transport_options["socket_timeout"] == conf.redis_socket_timeout == 10
    assert conf.broker_transport_options["socket_connect_timeout"] == conf.redis_socket_connect_timeout == 5


def test_the_clients_own_app_speaks_json_and_the_workers_priorities() -> None:
    conf = Client("redis://host/0").app.conf
    assert (conf.task_serializer, conf.result_serializer, conf.accept_content) == ("json", "json", ["json"])
    assert conf.broker_transport_options["priority_steps"] == list(range(10))


def test_a_client_does_not_become_the_current_app_of_its_process() -> None:
    def main() -> str:
        Celery("yours", broker="memory://")
        Client("redis://host/0")
        return str(current_app.main)

    # The current app is its thread's own: this one leaves with its thread.
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(main).result() == "yours"


def test_a_payload_that_breaks_the_contract_is_not_sent(client: Client) -> None:
    with pytest.raises(ImageBlocked):
        client.submit(Caption(image="file:///etc/passwd"))
    with pytest.raises(ValueError, match="prompt"):
        client.submit(Complete(prompt=[]))
