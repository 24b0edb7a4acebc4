"""The app of Celery's own monitors: what it tells Flower, and that it sends workers nothing."""

from __future__ import annotations

import time

from celery import Celery
from celery.backends.base import DisabledBackend

from config.settings import Settings
from tasks.redis_keys import OUR_STEPS
from tasks.worker_registry import ServedModel, models_key
from worker.demo import stack
from worker.monitor import known_queues, monitor_app

TLS = "?ssl_cert_reqs=required&ssl_ca_certs=/ca.crt"


def app_of(**settings: str) -> Celery:
    return monitor_app(Settings(**settings))


def test_flower_is_told_our_priorities_and_the_prefix_of_all_keys() -> None:
    app = app_of(queue="idefics.large", broker_key_prefix="ours.", priority_separator="#")
    options = app.conf.broker_transport_options
    assert (options["priority_steps"], options["sep"]) == (list(OUR_STEPS), "#")
    assert (options["global_keyprefix"], options["ack_emulation"]) == ("ours.", False)
    assert app.conf.task_default_queue == "idefics.large"


def test_flower_is_told_the_certificates_that_a_url_names() -> None:
    app = app_of(broker_url=f"rediss://localhost:6379/0{TLS}")
    assert app.conf.broker_use_ssl == {"ssl_cert_reqs": "required", "ssl_ca_certs": "/ca.crt"}
    assert not app_of(broker_url="redis://localhost:6379/0").conf.broker_use_ssl


def test_no_command_is_sent_and_no_worker_answers() -> None:
    # Nothing listens there: a command would raise.
    control = app_of(broker_url="redis://127.0.0.1:1/0").control
    control.enable_events()
    control.shutdown()
    control.revoke("id", terminate=True)
    assert control.inspect(timeout=0.1).stats() is None


def test_no_result_is_read() -> None:
    assert isinstance(app_of().backend, DisabledBackend)


def test_the_queues_of_known_models_are_shown(broker: stack.Broker) -> None:
    app, redis = app_of(broker_url=broker.url), broker.connect()
    models = {ServedModel(id, queue).written(): time.time() for id, queue in (("a", "idefics.a"), ("b", "idefics.b"))}
    redis.zadd(models_key(app), models)
    try:
        names = [queue.name for queue in known_queues(app, "idefics")]
    finally:
        redis.delete(models_key(app))
    assert names == ["idefics", "idefics.a", "idefics.b"]


def test_without_redis_the_own_queue_is_shown() -> None:
    assert [queue.name for queue in known_queues(app_of(broker_url="redis://127.0.0.1:1/0"), "idefics")] == ["idefics"]
