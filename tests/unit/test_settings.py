"""The worker's settings, what `python -m config` prints of them, and Celery's configuration."""

from __future__ import annotations

import os
from collections.abc import Callable
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import certifi
import pytest
from celery.app.defaults import NAMESPACES, flatten
from pydantic import ValidationError

from config.__main__ import lines
from config.celery import configuration, drop_overrides
from config.injected import is_injected
from config.settings import PREFIX, Settings, load
from tasks import Client

Environment = Callable[..., Settings]

SECRET = "s3cr3t"
WEBHOOK = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER_WEBHOOK = "whsec_c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Environment:
    """The settings of an environment that says this and nothing else."""
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)

    def settings(**values: str) -> Settings:
        for name, value in values.items():
            monkeypatch.setenv(PREFIX + name, value)
        return load()

    return settings


# Defaults


def test_the_defaults_are_those_of_the_contract(environment: Environment) -> None:
    settings = environment()
    assert settings.broker_url.get_secret_value() == "redis://localhost:6379/0"
    assert settings.result_backend.get_secret_value() == "redis://localhost:6379/1"
    assert settings.model == "demo"
    assert settings.model_revision is None
    assert (settings.dtype, settings.quantization, settings.device_map) == ("auto", "none", "auto")
    assert settings.image_root is None
    assert settings.image_allow_networks == settings.image_allow_domains == ()
    assert settings.callback_keys == {}


def test_every_setting_that_the_contract_names_is_there() -> None:
    named = (
        "BROKER_URL RESULT_BACKEND MODEL MODEL_REVISION DTYPE QUANTIZATION DEVICE_MAP MAX_BATCH_SIZE MAX_PROMPT_TOKENS "
        "MAX_NEW_TOKENS MAX_IMAGES PREFETCH IMAGE_ALLOW_NETWORKS IMAGE_ALLOW_DOMAINS IMAGE_PORTS IMAGE_MAX_BYTES "
        "IMAGE_ROOT CALLBACK_KEYS RESULT_TTL_S TIME_LIMIT_S SOFT_TIME_LIMIT_S"
    )
    assert set(named.lower().split()) <= set(Settings.model_fields)


def test_the_client_and_the_worker_agree_where_results_are(environment: Environment) -> None:
    settings = environment(BROKER_URL="redis://queue:6379/4")
    assert Client().app.conf.result_backend == settings.result_backend.get_secret_value()


def test_every_setting_has_a_description() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


# Reading


def test_the_environment_sets_them(environment: Environment) -> None:
    settings = environment(MAX_BATCH_SIZE="8", DTYPE="bfloat16", IMAGE_ROOT="/srv/images", MODEL="me/mine")
    assert settings.max_batch_size == 8
    assert settings.dtype == "bfloat16"
    assert settings.image_root == Path("/srv/images")
    assert settings.model == "me/mine"


def test_lists_are_comma_separated(environment: Environment) -> None:
    settings = environment(IMAGE_ALLOW_DOMAINS="example.com, cdn.example.org,", IMAGE_PORTS="80,8443")
    assert settings.image_allow_domains == ("example.com", "cdn.example.org")
    assert settings.image_ports == (80, 8443)


def test_a_port_alone_is_one_of_this_machine(environment: Environment) -> None:
    assert environment(METRICS_ADDRESS="9101").metrics_address == "127.0.0.1:9101"
    assert environment(METRICS_ADDRESS=":9101").metrics_address == "127.0.0.1:9101"
    assert environment(METRICS_ADDRESS="[::]:9101").metrics_address == "[::]:9101"


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "http://a:9101"])
def test_an_address_without_a_port_is_refused(address: str, environment: Environment) -> None:
    with pytest.raises(ValidationError, match=r"an address as 127\.0\.0\.1:9101"):
        environment(METRICS_ADDRESS=address)


def test_an_empty_list_is_empty(environment: Environment) -> None:
    assert environment(IMAGE_ALLOW_DOMAINS="", IMAGE_ALLOW_NETWORKS="").image_allow_domains == ()


def test_networks_are_read_as_networks(environment: Environment) -> None:
    settings = environment(IMAGE_ALLOW_NETWORKS="10.1.0.0/16,fd00::/8,192.168.1.7")
    assert settings.image_allow_networks == (
        ip_network("10.1.0.0/16"),
        ip_network("fd00::/8"),
        ip_network("192.168.1.7/32"),
    )


def test_callback_keys_are_pairs(environment: Environment) -> None:
    assert _secrets(environment(CALLBACK_KEYS=f"shop={WEBHOOK},blog={OTHER_WEBHOOK}")) == {
        "shop": [WEBHOOK],
        "blog": [OTHER_WEBHOOK],
    }


def test_a_callback_key_given_twice_has_both_secrets(environment: Environment) -> None:
    settings = environment(CALLBACK_KEYS=f"shop={OTHER_WEBHOOK},shop={WEBHOOK}")
    assert _secrets(settings) == {"shop": [OTHER_WEBHOOK, WEBHOOK]}


def _secrets(settings: Settings) -> dict[str, list[str]]:
    return {name: [secret.get_secret_value() for secret in secrets] for name, secrets in settings.callback_keys.items()}


def test_the_callback_schedule_is_read_in_its_order(environment: Environment) -> None:
    assert environment(CALLBACK_SCHEDULE_S="0,0.5,30").callback_schedule_s == (0, 0.5, 30)


def test_prefetch_follows_the_batch_size_unless_it_is_set(environment: Environment) -> None:
    assert environment(MAX_BATCH_SIZE="8").job_threads == 24
    assert environment(PREFETCH="5").job_threads == 5


def test_half_of_the_jobs_may_load_from_the_network_unless_it_is_said(environment: Environment) -> None:
    assert environment(MAX_BATCH_SIZE="8").image_job_concurrency == 8
    assert environment(PREFETCH="1").image_job_concurrency == 1
    assert environment(PREFETCH="5", IMAGE_JOBS="4").image_job_concurrency == 4


@pytest.mark.parametrize(("values", "expected"), [({"IMAGE_HOST_TURNS": "3"}, 3), ({"IMAGE_HOST_TURNS": ""}, 8)])
def test_an_old_name_sets_what_it_was_renamed_to(
    environment: Environment, values: dict[str, str], expected: int
) -> None:
    assert environment(**values).image_host_concurrency == expected


def test_a_setting_of_the_reserve_and_of_redeliveries_is_read_under_its_old_name(environment: Environment) -> None:
    assert environment(ATOMIC_TAKE="false").atomic_reserve is False
    assert environment(MAX_DELIVERIES="5").max_worker_deaths == 5


def test_a_new_name_goes_before_the_old_one(environment: Environment) -> None:
    assert environment(IMAGE_HOST_TURNS="3", IMAGE_HOST_CONCURRENCY="4").image_host_concurrency == 4


# Refusals


def test_an_unknown_name_is_refused_as_a_misspelt_one(environment: Environment) -> None:
    with pytest.raises(ValueError, match="IDEFICS_MODLE"):
        environment(MODLE="demo")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("IDEFICS_SERVICE_HOST", "10.0.0.11"),
        ("IDEFICS_SERVICE_PORT", "6379"),
        ("IDEFICS_PORT", "tcp://10.0.0.11:6379"),
        ("IDEFICS_REDIS_SERVICE_HOST", "fd00::11"),
        ("IDEFICS_REDIS_SERVICE_PORT", "6379"),
        ("IDEFICS_REDIS_SERVICE_PORT_CLIENT_TLS", "6379"),
        ("IDEFICS_REDIS_PORT", "tcp://10.0.0.11:6379"),
        ("IDEFICS_REDIS_PORT_6379_TCP", "tcp://10.0.0.11:6379"),
        ("IDEFICS_REDIS_PORT_6379_TCP_ADDR", "10.0.0.11"),
        ("IDEFICS_REDIS_PORT_6379_TCP_PORT", "6379"),
        ("IDEFICS_REDIS_PORT_6379_TCP_PROTO", "tcp"),
        ("IDEFICS_DNS_PORT_53_UDP", "udp://10.0.0.11:53"),
        # A Service whose name is a setting's.
        ("IDEFICS_BROKER_URL_SERVICE_HOST", "10.0.0.11"),
        ("IDEFICS_BROKER_URL_PORT", "tcp://10.0.0.11:6379"),
        ("IDEFICS_IMAGE_PORT", "tcp://10.0.0.11:80"),
        # docker run --link redis:idefics_redis
        ("IDEFICS_REDIS_NAME", "/worker/idefics_redis"),
        ("IDEFICS_REDIS_ENV_REDIS_VERSION", "7.4"),
    ],
)
def test_what_an_orchestrator_says_of_a_service_is_no_setting(
    environment: Environment, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    before = environment()
    monkeypatch.setenv(name, value)
    assert load() == before


@pytest.mark.parametrize(
    ("name", "value"), [("IMAGE_PORT", "80"), ("REDIS_SERVICE_HOST", "10.0.0.11 or so"), ("CALLBACK_PORT_443", "1")]
)
def test_a_misspelt_setting_is_no_services(environment: Environment, name: str, value: str) -> None:
    with pytest.raises(ValueError, match=name):
        environment(**{name: value})


def test_no_setting_could_be_taken_for_a_services() -> None:
    names = [f"_{name.upper()}" for name in Settings.model_fields]
    values = ("tcp://10.0.0.11:6379", "10.0.0.11", "6379", "tcp", "/worker/idefics")
    assert not [name for name in names for value in values if is_injected(name, value)]


def test_other_programs_names_are_left_alone(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_MODLE", "demo")
    assert environment().model == "demo"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAX_BATCH_SIZE", "0"),
        ("MAX_BATCH_SIZE", "many"),
        ("MAX_BATCH_TOKENS", "0"),
        ("MAX_PROMPT_TOKENS", "-1"),
        ("MAX_NEW_TOKENS", "-1"),
        ("MAX_IMAGES", "0"),
        ("PREFETCH", "-1"),
        ("IMAGE_MAX_BYTES", "0"),
        ("IMAGE_TIMEOUT_S", "0"),
        ("IMAGE_PORTS", "80,http"),
        ("IMAGE_PORTS", "70000"),
        ("IMAGE_ALLOW_NETWORKS", "10.1.0.0/33"),
        ("IMAGE_ALLOW_NETWORKS", "example.com"),
        ("DTYPE", "float8"),
        ("QUANTIZATION", "2bit"),
        ("RESULT_TTL_S", "0"),
        ("MAX_RETRIES", "-1"),
        ("LOG_LEVEL", "LOUD"),
        ("BROKER_URL", "amqp://localhost"),
        ("RESULT_BACKEND", "db+sqlite:///results"),
        ("CALLBACK_KEYS", "whsec_alone"),
        ("CALLBACK_KEYS", "shop=plain"),
        ("CALLBACK_KEYS", "shop=whsec_dG9vIHNob3J0"),
        ("CALLBACK_KEYS", f"shop={WEBHOOK}!"),
        ("CALLBACK_SCHEDULE_S", "0,-1"),
        ("CALLBACK_SCHEDULE_S", "soon"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_its_name(environment: Environment, name: str, value: str) -> None:
    with pytest.raises(ValidationError, match=name.lower()):
        environment(**{name: value})


@pytest.mark.parametrize(("soft", "hard"), [("600", "600"), ("700", "600")])
def test_the_soft_limit_comes_before_the_hard_one(environment: Environment, soft: str, hard: str) -> None:
    with pytest.raises(ValidationError, match="soft_time_limit_s"):
        environment(SOFT_TIME_LIMIT_S=soft, TIME_LIMIT_S=hard)


def test_a_key_is_not_remembered_for_longer_than_its_answer(environment: Environment) -> None:
    with pytest.raises(ValidationError, match="idempotency_ttl_s must be at most result_ttl_s"):
        environment(RESULT_TTL_S="60", IDEMPOTENCY_TTL_S="61")


def test_the_settings_are_frozen(environment: Environment) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        environment().model = "other"


# Secrets


def shown(settings: Settings) -> dict[str, str]:
    return dict(line.split("=", 1) for line in lines(settings))


def test_every_setting_is_printed_under_its_name(environment: Environment) -> None:
    assert set(shown(environment())) == {PREFIX + name.upper() for name in Settings.model_fields}


def test_what_is_printed_can_be_read_again(environment: Environment) -> None:
    printed = shown(environment(IMAGE_PORTS="80,81", IMAGE_ALLOW_NETWORKS="10.0.0.0/8", MAX_IMAGES="3"))
    assert printed["IDEFICS_IMAGE_PORTS"] == "80,81"
    assert printed["IDEFICS_IMAGE_ALLOW_NETWORKS"] == "10.0.0.0/8"
    assert printed["IDEFICS_MAX_IMAGES"] == "3"
    assert printed["IDEFICS_MODEL_REVISION"] == ""


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        (f"redis://:{SECRET}@host:6379/0", "redis://****@host:6379/0"),
        (f"rediss://user:{SECRET}@host/0?ssl_cert_reqs=required", "rediss://****@host/0?ssl_cert_reqs=required"),
        (f"redis://user:{SECRET}@{SECRET}@host/0", "redis://****@host/0"),
        ("redis://host/0", "redis://host/0"),
        ("redis+socket:///run/redis.sock", "redis+socket:///run/redis.sock"),
        (
            f"sentinel://:{SECRET}@a:1;sentinel://:{SECRET}@b:2/0?master_name=m&sentinel_password={SECRET}",
            "sentinel://****@b:2/0?master_name=m&sentinel_password=****",
        ),
    ],
)
def test_a_urls_password_is_masked(environment: Environment, url: str, masked: str) -> None:
    printed = shown(environment(BROKER_URL=url, RESULT_BACKEND=url))
    assert printed["IDEFICS_BROKER_URL"] == printed["IDEFICS_RESULT_BACKEND"] == masked


def test_the_sentinels_password_is_masked(environment: Environment) -> None:
    assert shown(environment(SENTINEL_PASSWORD=SECRET))["IDEFICS_SENTINEL_PASSWORD"] == "****"


def test_a_callback_keys_name_is_printed_and_its_secret_is_not(environment: Environment) -> None:
    settings = environment(CALLBACK_KEYS=f"shop={WEBHOOK},blog={WEBHOOK}")
    assert shown(settings)["IDEFICS_CALLBACK_KEYS"] == "shop=****,blog=****"


def test_no_secret_is_in_the_settings_own_text(environment: Environment) -> None:
    settings = environment(BROKER_URL=f"redis://:{SECRET}@host/0", CALLBACK_KEYS=f"shop={WEBHOOK}")
    assert WEBHOOK not in repr(settings) + str(settings)
    assert SECRET not in repr(settings) + str(settings)


@pytest.mark.parametrize(
    "values",
    [
        {"BROKER_URL": f"amqp://user:{SECRET}@host"},
        {"CALLBACK_KEYS": f"shop=whsec_{SECRET},blog=plain"},
        {"BROKER_URL": f"redis://:{SECRET}@host/0", "SOFT_TIME_LIMIT_S": "600", "TIME_LIMIT_S": "600"},
    ],
    ids=["url", "key", "limits"],
)
def test_a_refusal_does_not_print_the_secrets(environment: Environment, values: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="validation error") as refused:
        environment(**values)
    assert SECRET not in str(refused.value)


# Celery


@pytest.fixture
def celery(environment: Environment) -> dict[str, Any]:
    values = {"BROKER_URL": f"redis://:{SECRET}@queue/0", "RESULT_BACKEND": "redis://results/3", "PREFETCH": "7"}
    return configuration(environment(**values, RESULT_TTL_S="60", VISIBILITY_TIMEOUT_S="900"), "idefics", 5)


def test_celery_has_the_urls_with_their_passwords(celery: dict[str, Any]) -> None:
    assert celery["broker_url"] == f"redis://:{SECRET}@queue/0"
    assert celery["result_backend"] == "worker.queue.result_backend:ResultBackend+redis://results/3"


@pytest.mark.parametrize(
    ("url", "backend"),
    [
        ("rediss://a/1?ssl_cert_reqs=required", "ResultBackend+rediss://a/1?ssl_cert_reqs=required"),
        ("redis+socket:///run/redis", "ResultBackend+socket:///run/redis"),
        ("socket:///run/redis", "ResultBackend+socket:///run/redis"),
        ("sentinel://a/1?master_name=m", "SentinelResultBackend+sentinel://a/1"),
    ],
)
def test_results_go_through_our_own_backend(environment: Environment, url: str, backend: str) -> None:
    celery = configuration(environment(RESULT_BACKEND=url), "idefics", 5)
    assert celery["result_backend"] == f"worker.queue.result_backend:{backend}"


def test_celery_reads_and_writes_json_only(celery: dict[str, Any]) -> None:
    assert celery["task_serializer"] == celery["result_serializer"] == "json"
    assert celery["accept_content"] == celery["result_accept_content"] == ["json"]


def test_a_job_leaves_the_queue_once_its_result_is_stored(celery: dict[str, Any]) -> None:
    assert celery["task_acks_late"] is True
    assert celery["task_reject_on_worker_lost"] is True
    assert celery["worker_deduplicate_successful_tasks"] is False


def test_celery_runs_our_pool_on_our_queue(celery: dict[str, Any]) -> None:
    assert celery["worker_pool"] == "worker.pool:InferencePool"
    assert celery["worker_concurrency"] == 1
    assert [queue.name for queue in celery["task_queues"]] == ["idefics"]
    assert celery["task_default_priority"] == 5


def test_our_tasks_go_to_our_queue_and_all_others_where_a_stock_app_sends_them(environment: Environment) -> None:
    celery = configuration(environment(), "idefics", 5, ["idefics.caption"])
    assert celery["task_routes"] == {"idefics.caption": {"queue": "idefics"}}
    assert celery["task_default_queue"] == "celery"
    assert configuration(environment(DEFAULT_QUEUE="site"), "idefics", 5)["task_default_queue"] == "site"


def test_celery_prefetches_what_the_pool_holds(celery: dict[str, Any]) -> None:
    assert celery["worker_prefetch_multiplier"] * celery["worker_concurrency"] == 7
    assert celery["worker_eta_task_limit"] > 7


def test_a_reconnect_does_not_end_running_jobs(celery: dict[str, Any]) -> None:
    assert celery["worker_cancel_long_running_tasks_on_connection_loss"] is False


def test_what_a_full_server_refuses_is_tried_again(celery: dict[str, Any]) -> None:
    assert celery["broker_channel_error_retry"] is True


def test_jobs_are_taken_in_one_step_unless_told_otherwise(environment: Environment) -> None:
    assert environment().atomic_reserve is True
    assert environment(ATOMIC_RESERVE="false").atomic_reserve is False


def test_celery_reads_every_priority_in_order(celery: dict[str, Any]) -> None:
    options = celery["broker_transport_options"]
    assert options["priority_steps"] == list(range(10))
    assert options["queue_order_strategy"] == "priority"
    assert options["visibility_timeout"] == 900


@pytest.mark.parametrize(("timeout", "interval"), [(3_600, 10), (40, 10), (6, 1), (1, 1)])
def test_a_dead_workers_jobs_are_looked_for_soon_after_their_timeout(timeout: int, interval: int) -> None:
    options = configuration(Settings(visibility_timeout_s=timeout), "idefics", 5)["broker_transport_options"]
    assert options["unacked_restore_interval"] == interval
    assert options["unacked_restore_throttle"] == 1
    # A worker that dies with the lock of that look keeps the others from it for as long.
    assert options["unacked_mutex_expire"] == interval


def test_results_are_kept_for_their_time(celery: dict[str, Any]) -> None:
    assert celery["result_expires"] == 60


def test_the_limits_are_celerys(environment: Environment) -> None:
    settings = environment(TIME_LIMIT_S="9", SOFT_TIME_LIMIT_S="8")
    celery = configuration(settings, "idefics", 5)
    assert (celery["task_time_limit"], celery["task_soft_time_limit"]) == (9, 8)


def test_celery_knows_every_name_of_the_configuration(celery: dict[str, Any]) -> None:
    # Read by the Redis backend, though not in Celery's list.
    unlisted = {"redis_backend_health_check_interval", "result_backend_thread_safe"}
    assert set(celery) <= {name for name, _ in flatten(NAMESPACES)} | unlisted


@pytest.mark.parametrize("name", ["BROKER_URL", "RESULT_BACKEND"])
def test_tls_without_its_certificates_spelled_out_is_refused_with_its_cure(environment: Environment, name: str) -> None:
    with pytest.raises(ValidationError, match=r"ssl_cert_reqs=required&ssl_ca_certs=") as refused:
        environment(**{name: f"rediss://user:{SECRET}@host/0"})
    assert SECRET not in str(refused.value)


def test_the_results_lie_beside_the_queues_with_the_same_certificates(environment: Environment) -> None:
    query = "?ssl_cert_reqs=required&ssl_ca_certs=/ca.crt&ssl_certfile=/tls.crt&ssl_keyfile=/tls.key"
    settings = environment(BROKER_URL=f"rediss://host/0{query}")
    assert settings.result_backend.get_secret_value() == f"rediss://host/1{query}"


def test_a_file_of_authorities_must_hold_some(environment: Environment, tmp_path: Path) -> None:
    own = tmp_path / "ca.pem"
    own.write_text(Path(certifi.where()).read_text())
    assert environment(CA_FILE=str(own)).ca_file == own
    own.write_text("no certificate")
    for file in (own, tmp_path / "none.pem", tmp_path):
        with pytest.raises(ValidationError, match="ca_file"):
            environment(CA_FILE=str(file))


@pytest.mark.parametrize("queue", ["idefics", "idefics.large", "idefics.smolvlm-2.b"])
def test_a_model_has_a_queue_of_its_own(queue: str) -> None:
    chosen = Settings(queue=queue)
    assert [each.name for each in configuration(chosen, chosen.queue, 5)["task_queues"]] == [queue]


@pytest.mark.parametrize("queue", ["", "celery", "idefics.callbacks", "unacked", "idefics:due:idefics", "idefics."])
def test_other_queues_are_refused(queue: str) -> None:
    with pytest.raises(ValidationError, match="queue"):
        Settings(queue=queue)


def test_celerys_own_variables_that_say_the_same_are_dropped() -> None:
    """A URL alone would select Celery's own result backend."""
    chosen = Settings(broker_url="redis://a/0", result_backend="redis://a/1")
    environment = {"CELERY_BROKER_URL": "redis://a/0", "CELERY_RESULT_BACKEND": "redis://a/1", "HOME": "/"}
    assert drop_overrides(environment, chosen) is None
    assert environment == {"HOME": "/"}


@pytest.mark.parametrize("name", ["CELERY_BROKER_URL", "CELERY_BROKER_WRITE_URL", "CELERY_RESULT_BACKEND"])
def test_celerys_own_variables_that_say_something_else_are_named(name: str) -> None:
    told = drop_overrides({name: "redis://:secret@b/7"}, Settings(broker_url="redis://a/0"))
    assert told is not None
    assert name in told
    assert "secret" not in told
