"""docker-compose.yml, its Dockerfile and .env.example: what they say, and their very commands run as processes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
import yaml

from config.settings import PREFIX, Settings
from tests.support.guarded import MOUNT, as_user, make_secrets
from tests.support.stand import Producer
from tests.support.waiting import PATIENCE_S, SOON_S, eventually
from worker.demo import stack

CHECKOUT = stack.CHECKOUT
PROGRAMS = Path(sys.executable).parent
#: Of the processes that the tests stop: seconds that they wait for their jobs.
SOFT_S = 8.0


def compose(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The file with its `${NAME:-default}` replaced."""
    written = (CHECKOUT / "docker-compose.yml").read_text()
    given = environment or {}
    whole = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: given.get(match[1]) or match[2], written)
    return dict(yaml.safe_load(whole))


SERVICES: dict[str, Any] = compose()["services"]
GRAFANA = "deploy/grafana/provisioning"
WORKERS = ("worker", "worker-cpu")
#: They watch the others, and come up with `--profile monitoring` only.
MONITORING = ("flower", "queue-metrics", "prometheus", "grafana")


# --- What the compose file says -------------------------------------------------------------------


def test_the_file_is_of_the_compose_specification_and_has_our_services() -> None:
    assert "version" not in compose()
    assert set(SERVICES) == {"redis", "callbacks", "client", *WORKERS, *MONITORING}


def test_redis_keeps_what_it_accepted_and_refuses_what_it_cannot_hold() -> None:
    options = _redis_options()
    assert options["appendonly"] == "yes"
    assert options["appendfsync"] == "everysec"
    assert options["maxmemory-policy"] == "noeviction"
    assert options["maxmemory"].endswith("gb")
    assert "redis-data:/data" in SERVICES["redis"]["volumes"]


def test_only_monitoring_publishes_ports_and_only_to_this_machine() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) <= set(MONITORING)
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    assert not [name for name, service in SERVICES.items() if "network_mode" in service]


def test_flower_has_a_login_reads_only_and_has_the_rights_of_a_monitor() -> None:
    service = SERVICES["flower"]
    assert service["profiles"] == ["monitoring"]
    assert service["command"][:4] == ["celery", "-A", "worker.monitor", "flower"]
    assert "--read_only" in service["command"]
    required = [file["path"] for file in service["env_file"] if file.get("required", True)]
    # Compose starts no service whose required file is missing: never without a login.
    assert required == ["secrets/monitor/env", "secrets/flower/env"]
    assert service["volumes"] == [f"./secrets/monitor:{MOUNT}:ro"]
    assert service["build"]["args"] == {"EXTRA": "flower"}


def test_monitoring_has_a_profile_and_reads_only_what_ships() -> None:
    assert all(SERVICES[name]["profiles"] == ["monitoring"] for name in MONITORING)
    for name in ("prometheus", "grafana"):
        mounted = [volume.split(":") for volume in SERVICES[name]["volumes"] if volume.startswith("./")]
        assert mounted
        assert all((CHECKOUT / source).is_dir() and mode == "ro" for source, _, mode in mounted)


def test_prometheus_scrapes_services_that_exist_and_grafana_asks_prometheus() -> None:
    scraping = yaml.safe_load((CHECKOUT / "deploy/prometheus/prometheus.yaml").read_text())["scrape_configs"]
    names = {name for job in scraping for found in job["dns_sd_configs"] for name in found["names"]}
    assert names == {*WORKERS, "callbacks", "queue-metrics"}
    (source,) = yaml.safe_load((CHECKOUT / GRAFANA / "datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((CHECKOUT / GRAFANA / "dashboards/idefics.yaml").read_text())["providers"]
    assert f"./deploy/grafana:{provider['options']['path']}:ro" in SERVICES["grafana"]["volumes"]


def test_the_queue_exporter_has_the_rights_of_its_own_redis_user_only() -> None:
    service = SERVICES["queue-metrics"]
    assert service["command"] == ["python", "-m", "worker.observability.queue"]
    assert service["env_file"] == "secrets/exporter/env"
    assert service["volumes"] == [f"./secrets/exporter:{MOUNT}:ro"]


def test_volumes_are_named_and_the_secrets_are_read_only() -> None:
    used = {tuple(volume.split(":")) for service in SERVICES.values() for volume in service["volumes"]}
    bound = {volume for volume in used if volume[0].startswith(".")}
    assert {volume[0] for volume in used - bound} == set(compose()["volumes"])
    users = ("redis", "worker", "callbacks", "producer", "monitor", "exporter")
    secrets = {(f"./secrets/{user}", MOUNT, "ro") for user in users}
    shipped = {volume for volume in bound if volume[0].startswith("./deploy/")}
    assert bound == {*secrets, *shipped, ("./examples", "/app/examples", "ro")}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_writes_to_its_volumes_and_tmp_alone_and_has_no_rights_of_roots(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["tmpfs"] == ["/tmp"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service.get("user") == ("redis" if name == "redis" else None)


def test_the_secrets_stay_out_of_git_and_out_of_the_image() -> None:
    assert "secrets/" in (CHECKOUT / ".gitignore").read_text().splitlines()
    assert "!secrets" not in (CHECKOUT / ".dockerignore").read_text()


def test_redis_speaks_tls_alone_to_clients_with_a_certificate() -> None:
    options = _redis_options()
    assert options["port"] == "0"
    assert options["tls-auth-clients"] == "yes"
    assert {Path(options[name]).name for name in options if name.endswith("-file")} == {"tls.crt", "tls.key", "ca.crt"}
    assert options["aclfile"] == f"{MOUNT}/users.acl"


def test_every_service_restarts_and_says_when_it_is_healthy() -> None:
    assert {name for name, service in SERVICES.items() if service.get("restart") != "unless-stopped"} == {"client"}
    kind, program, *_, command = SERVICES["redis"]["healthcheck"]["test"]
    assert (kind, program, command) == ("CMD", "redis-cli", "ping")
    probe = ["CMD", "python", "-m", "worker.health", "--ready"]
    assert all(SERVICES[name]["healthcheck"]["test"] == probe for name in WORKERS)
    assert "inspect ping" in SERVICES["callbacks"]["healthcheck"]["test"][1]


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_starts_after_redis_and_is_reaped_and_stopped_softly(name: str) -> None:
    service = SERVICES[name]
    assert service["command"] == ["celery", "-A", "worker.app", "worker"]
    assert service["init"] is True
    assert service["depends_on"] == {"redis": {"condition": "service_healthy"}}
    assert service["environment"]["REMAP_SIGTERM"] == "SIGQUIT"
    assert service["env_file"] == [{"path": "secrets/worker/env"}, {"path": ".env", "required": False}]
    assert "hub-cache:/cache" in service["volumes"]


@pytest.mark.parametrize("name", WORKERS)
def test_the_grace_period_is_longer_than_the_soft_shutdown(name: str) -> None:
    assert _seconds(SERVICES[name]["stop_grace_period"]) >= Settings().soft_shutdown_timeout_s + 15


def test_the_gpu_worker_has_one_gpu_and_the_9b_by_default() -> None:
    (device,) = SERVICES["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert SERVICES["worker"]["environment"]["IDEFICS_MODEL"] == "HuggingFaceM4/idefics-9b"
    assert "profiles" not in SERVICES["worker"]


def test_the_gpu_workers_model_comes_from_the_environment() -> None:
    services = compose({"IDEFICS_MODEL": "some/other"})["services"]
    assert services["worker"]["environment"]["IDEFICS_MODEL"] == "some/other"
    assert services["worker-cpu"]["environment"]["IDEFICS_MODEL"] == "demo"


def test_the_cpu_worker_has_a_profile_and_no_gpu() -> None:
    assert SERVICES["worker-cpu"]["profiles"] == ["cpu"]
    assert "deploy" not in SERVICES["worker-cpu"]


@pytest.mark.parametrize("name", WORKERS)
def test_the_environment_has_known_settings_only(name: str) -> None:
    assert {key for key in SERVICES[name]["environment"] if key.startswith(PREFIX)} <= set(_setting_names())


def test_the_callbacks_worker_is_light_and_has_time_to_end_its_attempts() -> None:
    service = SERVICES["callbacks"]
    assert service["command"] == ["celery", "-A", "worker.callbacks", "worker"]
    assert service["build"]["args"] == {"EXTRA": "callbacks"}
    assert service["image"] not in [SERVICES[name].get("image") for name in WORKERS]
    assert "environment" not in service
    assert service["env_file"] == [{"path": "secrets/callbacks/env"}, {"path": ".env", "required": False}]
    assert service["cap_drop"] == ["ALL"]
    assert _seconds(service["stop_grace_period"]) >= Settings().callback_timeout_s + 10


def test_the_client_is_a_producer_in_the_callbacks_image_and_runs_when_asked() -> None:
    service = SERVICES["client"]
    assert service["profiles"] == ["client"]
    assert (service["image"], service["build"]) == (SERVICES["callbacks"]["image"], SERVICES["callbacks"]["build"])
    assert service["env_file"] == [{"path": "secrets/producer/env"}, {"path": ".env", "required": False}]
    assert "client" in (CHECKOUT / "docs/operation.md").read_text().partition("docker compose run --rm ")[2].split()[0]


def _redis_options() -> dict[str, str]:
    _, *options = SERVICES["redis"]["command"]
    return {name.removeprefix("--"): value for name, value in zip(options[::2], options[1::2], strict=True)}


def _seconds(duration: str) -> float:
    match = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", duration)
    assert match, duration
    return 60.0 * int(match[1] or 0) + int(match[2] or 0)


# --- .env.example and the Dockerfile --------------------------------------------------------------


def test_the_example_environment_has_every_setting_once_and_no_other() -> None:
    assert sorted(name for name, _, _ in _example() if name.startswith(PREFIX)) == sorted(_setting_names())


def test_what_the_example_comments_out_is_the_default_or_an_example(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    defaults = Settings()
    commented = {name: value for name, value, is_comment in _example() if name.startswith(PREFIX) and is_comment}
    # Must be there, and is the operator's own.
    assert commented.pop("IDEFICS_CA_FILE")
    for name, value in commented.items():
        monkeypatch.setenv(name, value)
    shown = Settings()
    fields = [name.removeprefix(PREFIX).lower() for name in commented]
    differing = {field for field in fields if getattr(shown, field) != getattr(defaults, field)}
    assert {field for field in differing if getattr(defaults, field)} == set()


def test_the_example_sets_the_model_alone() -> None:
    assert [(name, value) for name, value, is_comment in _example() if not is_comment] == [
        ("IDEFICS_MODEL", "HuggingFaceM4/idefics-9b")
    ]


def test_every_variable_of_the_compose_file_is_in_the_example() -> None:
    read = re.findall(r"\$\{(\w+)", (CHECKOUT / "docker-compose.yml").read_text())
    assert set(read) <= {name for name, _, _ in _example()}


def test_everything_that_the_dockerfile_copies_exists_and_is_not_ignored() -> None:
    kept = set((CHECKOUT / ".dockerignore").read_text().splitlines())
    sources = [source for line in _instructions("COPY") for source in line.split()[:-1]]
    assert sources
    assert [source for source in sources if not (CHECKOUT / source).exists()] == []
    assert [source for source in sources if f"!{source}" not in kept] == []


def test_what_the_dockerfile_copies_is_all_that_the_worker_imports(tmp_path: Path) -> None:
    for source in (source for line in _instructions("COPY") for source in line.split()[:-1]):
        (tmp_path / source).symlink_to(CHECKOUT / source)
    code = "import worker.app, worker.pool, worker.model_process; print(worker.app.__file__)"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=_bare_environment(), capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == str(tmp_path / "worker" / "app.py"), run.stderr


def test_the_callbacks_image_installs_the_callbacks_extra_and_no_torch() -> None:
    assert "EXTRA=worker" in _instructions("ARG")
    runs = [line for line in _instructions("RUN") if "pip install" in line or "EXTRA" in line]
    assert runs[0].startswith('[ "$EXTRA" != worker ]')
    assert runs[-1].endswith('".[$EXTRA${WITH:+,$WITH}]"')


def test_the_image_is_slim_and_runs_as_an_ordinary_user() -> None:
    assert _instructions("FROM") == ["python:${PYTHON_VERSION}-slim"]
    assert "PYTHON_VERSION=3.12" in _instructions("ARG")
    assert _instructions("USER") == ["worker"]


def test_no_package_registry_is_named() -> None:
    """Which one it is, pip's configuration says."""
    for file in ("Dockerfile", "docker-compose.yml", ".env.example"):
        assert not re.search(r"https?://", (CHECKOUT / file).read_text()), file


def _setting_names() -> list[str]:
    return [PREFIX + name.upper() for name in Settings.model_fields]


def _example() -> list[tuple[str, str, bool]]:
    """Name, value, and whether it is commented out."""
    lines = (CHECKOUT / ".env.example").read_text().splitlines()
    found = [re.fullmatch(r"(#?)([A-Z][A-Z0-9_]*)=(.*)", line) for line in lines]
    return [(match[2], match[3], bool(match[1])) for match in found if match]


def _instructions(kind: str) -> list[str]:
    lines = (CHECKOUT / "Dockerfile").read_text().splitlines()
    return [line.removeprefix(kind).strip() for line in lines if line.startswith(f"{kind} ")]


# --- Its commands, run ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_secrets(tmp_path_factory.mktemp("compose") / "secrets")


@pytest.fixture(scope="module")
def server(secrets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[stack.Broker]:
    """Redis by the compose file's command, for its user `worker`."""
    with _redis(tmp_path_factory.mktemp("data"), stack.free_port(), secrets) as server:
        yield server


@pytest.fixture
def producer(server: stack.Broker, secrets: Path) -> Producer:
    return Producer(as_user(server, secrets, "producer"))


def test_redis_runs_with_those_options(server: stack.Broker, secrets: Path) -> None:
    with as_user(server, secrets, "monitor").connect() as client:
        found = client.info()
    assert found["aof_enabled"] == 1
    assert found["maxmemory_policy"] == "noeviction"
    assert found["maxmemory"] >= 2**30


def test_a_queued_job_outlives_a_restart_of_redis(tmp_path: Path, secrets: Path) -> None:
    port = stack.free_port()
    with _redis(tmp_path, port, secrets) as server:
        Producer(as_user(server, secrets, "producer")).complete().apply_async()
    with _redis(tmp_path, port, secrets) as server:
        assert Producer(as_user(server, secrets, "producer")).queued() == 1


def test_the_worker_answers_is_healthy_and_stops(server: stack.Broker, producer: Producer, tmp_path: Path) -> None:
    with _worker(server, tmp_path / "log") as process:
        assert producer.complete().apply_async().get(timeout=PATIENCE_S)["text"] == "llo"
        assert _is_healthy(server, tmp_path / "log")
        _stop(process)
    assert not _is_healthy(server, tmp_path / "log")


def test_the_client_has_the_worker_answer(server: stack.Broker, secrets: Path, tmp_path: Path) -> None:
    user = as_user(server, secrets, "producer")
    environment = _environment(user, tmp_path / "log")
    command = [*SERVICES["client"]["entrypoint"], "submit", "complete", "prompt=Hello", "max_new_tokens:=3", "--wait"]
    command[0] = str(PROGRAMS / command[0])
    with _worker(server, tmp_path / "log"):
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert json.loads(run.stdout)["text"] == "llo", run.stderr


def test_a_worker_that_is_stopped_ends_its_running_jobs_and_leaves_as_soon(
    server: stack.Broker, producer: Producer, tmp_path: Path
) -> None:
    with _worker(server, tmp_path / "log") as process:
        job = producer.complete("Hello", tokens=100).apply_async()
        eventually(lambda: job.state == "STARTED")
        # FAILS while Celery sleeps through its whole soft shutdown, whatever ends meanwhile (reported).
        # The job lasts 2 s; the stop must not take all of the 8 s that it may.
        _stop(process, within=SOFT_S - 2)
    assert job.state == "SUCCESS"
    assert _unfinished(server) == 0


def test_a_job_that_outlasts_the_soft_shutdown_goes_back_to_the_queue(
    server: stack.Broker, producer: Producer, tmp_path: Path
) -> None:
    with _worker(server, tmp_path / "log", IDEFICS_SOFT_SHUTDOWN_TIMEOUT_S="1") as process:
        job = producer.complete("Hello", tokens=500).apply_async()
        eventually(lambda: job.state == "STARTED")
        _stop(process)
    assert job.state == "STARTED"
    assert producer.queued() == 1
    with _worker(server, tmp_path / "next"):
        assert job.get(timeout=PATIENCE_S)["finish_reason"] == "length"


@contextmanager
def _redis(folder: Path, port: int, secrets: Path) -> Iterator[stack.Broker]:
    """Without its TLS, which not every server has: see test_redis_tls.py."""
    options = {name: value for name, value in _redis_options().items() if not name.startswith("tls-")}
    options |= {"port": str(port), "bind": "127.0.0.1", "dir": str(folder)}
    options["aclfile"] = options["aclfile"].replace(MOUNT, str(secrets / "redis"))
    command = [stack.server_binary(), *(part for name, value in options.items() for part in (f"--{name}", value))]
    with stack.started(command, log=folder / "log") as process:
        server = as_user(stack.Broker(port, process=process), secrets, "worker")
        eventually(lambda: _pings(server))
        yield server


def _pings(server: stack.Broker) -> bool:
    try:
        return bool(server.connect().ping())
    except redis.ConnectionError:
        return False


def _bare_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}


def _environment(server: stack.Broker, log: Path, **more: str) -> dict[str, str]:
    """The cpu worker's, with this Redis, the quick model, and its own temporary directory as in a container."""
    environment = _bare_environment() | SERVICES["worker-cpu"]["environment"]
    environment |= {"IDEFICS_BROKER_URL": server.url, "IDEFICS_RESULT_BACKEND": server.results}
    environment |= {"IDEFICS_MODEL": "fake:0.02", "IDEFICS_SOFT_SHUTDOWN_TIMEOUT_S": str(SOFT_S)}
    return environment | {"PATH": f"{PROGRAMS}:{os.environ['PATH']}", "TMPDIR": str(log.parent)} | more


@contextmanager
def _worker(server: stack.Broker, log: Path, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    program, *arguments = SERVICES["worker-cpu"]["command"]
    command = [str(PROGRAMS / program), *arguments]
    with stack.started(command, log=log, environment=_environment(server, log, **more)) as process:
        stack.await_line(process, log, " ready.", stack.WORKER_START_S)
        yield process


def _is_healthy(server: stack.Broker, log: Path) -> bool:
    kind, program, *arguments = SERVICES["worker-cpu"]["healthcheck"]["test"]
    assert kind == "CMD"
    command = [str(PROGRAMS / program), *arguments]
    run = subprocess.run(command, env=_environment(server, log), cwd=CHECKOUT, capture_output=True, timeout=PATIENCE_S)
    return run.returncode == 0


def _stop(process: subprocess.Popen[bytes], within: float | None = None) -> None:
    """As `docker compose stop`. It leaves by itself in the grace period, and nothing stays."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    status = process.wait(within or _seconds(SERVICES["worker-cpu"]["stop_grace_period"]))
    # Celery exits with 1 after SIGQUIT, which SIGTERM stands for here.
    assert status in (0, 1), shlex.join(map(str, process.args))
    assert psutil.wait_procs(children, timeout=SOON_S)[1] == []


def _unfinished(server: stack.Broker) -> int:
    """Jobs that the broker still holds, queued or taken."""
    with server.connect() as client:
        return Producer(server).queued() + int(client.hlen("unacked"))
