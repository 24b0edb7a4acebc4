"""deploy/: alerts, dashboards, manifests and units, checked by the programs that read them."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import kubernetes_validate
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from config.settings import PREFIX, Settings
from tests.support.dashboards import DASHBOARDS, queries
from worker.demo.stack import CHECKOUT
from worker.observability import metrics, queue

DEPLOY = CHECKOUT / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yaml"
KUBERNETES = DEPLOY / "kubernetes"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
MANIFESTS = sorted(path for path in KUBERNETES.glob("*.yaml"))
#: Kinds that are not Kubernetes' own.
KUSTOMIZATION, SCALED_OBJECT = "Kustomization", "ScaledObject"

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


@cache
def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DEPLOY / "grafana" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- Prometheus and Grafana -----------------------------------------------------------------------


@needs_promtool
def test_promtool_accepts_the_alerts_and_their_tests_pass() -> None:
    for command in (["check", "rules", ALERTS.name], ["test", "rules", "alerts_test.yaml"]):
        done = subprocess.run(["promtool", *command], cwd=ALERTS.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_accepts_the_dashboards_queries(tmp_path: Path) -> None:
    rules = [{"record": f"query_{number}", "expr": query} for number, query in enumerate(queries())]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboards_are_what_their_generator_writes() -> None:
    made = dict(_generator().dashboards())
    assert set(made) == set(DASHBOARDS)
    stale = [path.name for path, text in made.items() if path.read_text() != text]
    assert not stale, "run python deploy/grafana/generate.py"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_has_grafanas_form(path: Path) -> None:
    written = json.loads(path.read_text())
    read = json.loads(json.dumps(Dashboard.from_json(written), cls=JSONEncoder))
    # Grafana's own model drops what it does not know.
    assert read == written


def test_alerts_and_dashboards_name_only_metrics_that_are_exported() -> None:
    # That each of these is exported under load is tested where they are counted.
    exported = {each.name for registry in metrics.DEFINITIONS.values() for each in registry} | set(queue.GAUGES)
    rules = [rule["expr"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    scaled = [trigger["metadata"]["query"] for trigger in _of_kind(SCALED_OBJECT)[0]["spec"]["triggers"]]
    named = {name for query in (*queries(), *rules, *scaled) for name in re.findall(r"\bidefics_\w+", query)}
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in named} <= exported


# --- Kubernetes -----------------------------------------------------------------------------------


def _documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def _of_kind(kind: str) -> list[dict[str, Any]]:
    return [document for path in MANIFESTS for document in _documents(path) if document["kind"] == kind]


def _containers() -> list[dict[str, Any]]:
    pods = [each["spec"]["template"]["spec"] for each in _of_kind("Deployment")]
    return [container for pod in pods for container in pod["containers"]]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_fits_kubernetes_schemas(path: Path) -> None:
    for document in _documents(path):
        if document["kind"] not in (KUSTOMIZATION, SCALED_OBJECT):
            kubernetes_validate.validate(document, "1.33", strict=True)


def test_the_kustomization_has_all_manifests_and_makes_all_maps_and_secrets() -> None:
    (kustomization,) = _of_kind(KUSTOMIZATION)
    assert {*kustomization["resources"], "kustomization.yaml"} == {path.name for path in MANIFESTS}
    made = {each["name"] for kind in ("configMapGenerator", "secretGenerator") for each in kustomization[kind]}
    text = "\n".join(path.read_text() for path in MANIFESTS if path.name != "kustomization.yaml")
    required = set(re.findall(r"(?:secretName|configMapRef: \{name|secretRef: \{name): (idefics-[\w-]+)[}\s]", text))
    assert required == made
    assert {image["name"] for image in kustomization["images"]} == {each["image"] for each in _containers()}


def test_settings_in_manifests_and_units_exist() -> None:
    texts = [path.read_text() for path in (*KUBERNETES.iterdir(), *UNITS) if path.is_file()]
    named = {name for text in texts for name in re.findall(rf"\b{PREFIX}(\w+)=", text)}
    assert named
    assert named <= {name.upper() for name in Settings.model_fields}


def test_a_pod_has_longer_to_end_than_its_jobs() -> None:
    settings = dict(line.split("=", 1) for line in (KUBERNETES / "settings.env").read_text().split())
    worker = next(each for each in _of_kind("Deployment") if each["metadata"]["name"] == "idefics-worker")
    grace = worker["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > float(settings["IDEFICS_SOFT_SHUTDOWN_TIMEOUT_S"])


@pytest.mark.parametrize("container", _containers(), ids=lambda container: container["name"])
def test_a_container_has_no_rights_of_roots_and_a_memory_limit(container: dict[str, Any]) -> None:
    confined = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert container["securityContext"] == confined
    assert container["resources"]["limits"]["memory"]


def test_keda_scales_the_workers_by_the_oldest_job_and_by_all_priorities() -> None:
    (scaled,) = _of_kind(SCALED_OBJECT)
    spec = scaled["spec"]
    assert spec["scaleTargetRef"]["name"] in {each["metadata"]["name"] for each in _of_kind("Deployment")}
    # The names of KEDA's fields, as in its API v1alpha1.
    assert set(spec) <= {
        "scaleTargetRef", "minReplicaCount", "maxReplicaCount", "pollingInterval", "cooldownPeriod", "fallback",
        "advanced", "triggers", "idleReplicaCount", "initialCooldownPeriod",
    }  # fmt: skip
    assert all(set(trigger) <= {"type", "metadata", "name", "metricType"} for trigger in spec["triggers"])
    assert {trigger["type"] for trigger in spec["triggers"]} == {"prometheus"}
    allowed = {"serverAddress", "query", "threshold", "activationThreshold"}
    assert all(set(trigger["metadata"]) == allowed for trigger in spec["triggers"])
    queries = " ".join(trigger["metadata"]["query"] for trigger in spec["triggers"])
    assert "idefics_queue_oldest_job_age_seconds" in queries
    assert "idefics_queue_jobs_waiting" in queries


# --- systemd --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_a_unit(path: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True)
    # The program is not installed in /opt here.
    complaints = [line for line in done.stderr.splitlines() if "is not executable" not in line]
    assert not complaints
