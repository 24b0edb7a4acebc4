"""Every curve of the dashboards, and every alert, with a real Prometheus that scrapes real workers under load."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml

from tasks import Callback, Caption, Classify, Client, Complete, SubmittedJob
from tests.conftest import PICTURES, callback_settings
from tests.support.dashboards import queries
from tests.support.gallery import Gallery
from tests.support.receiver import Receiver
from tests.support.stand import callbacks_worker, plain_stand
from tests.support.waiting import eventually
from worker.demo import stack

pytestmark = [
    pytest.mark.skipif(not shutil.which("prometheus"), reason="Debian's package `prometheus` is not installed"),
]

DEPLOY = stack.CHECKOUT / "deploy"
#: What a machine without a GPU does not have.
WITHOUT_GPU = ("idefics_gpu_memory_bytes", "idefics_gpu_utilization_ratio")


@dataclass(frozen=True)
class Prometheus:
    address: str

    def query(self, expression: str) -> list[Any]:
        with urlopen(f"http://{self.address}/api/v1/query?{urlencode({'query': expression})}", timeout=5) as answer:
            return list(json.load(answer)["data"]["result"])

    def rules(self) -> list[dict[str, Any]]:
        with urlopen(f"http://{self.address}/api/v1/rules", timeout=5) as answer:
            return [rule for group in json.load(answer)["data"]["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has scraped a worker, a callbacks worker and the queue exporter under load."""
    folder = tmp_path_factory.mktemp("prometheus")
    worker, callbacks, queue, served = (f"127.0.0.1:{stack.free_port()}" for _ in range(4))
    with ExitStack() as opened:
        gallery, broker = opened.enter_context(Gallery().open()), opened.enter_context(stack.broker())
        # It refuses one callback for good.
        receiver = opened.enter_context(Receiver(answers=[410]).open())
        settings = callback_settings(receiver.port)
        demo = {"MODEL": "demo", "IMAGE_ROOT": str(PICTURES), "METRICS_ADDRESS": worker, "MAX_RETRIES": "1"}
        stood = opened.enter_context(plain_stand(broker, gallery, folder / "worker.log", **demo, **settings))
        opened.enter_context(
            callbacks_worker(broker, folder / "callbacks.log", {**settings, "METRICS_ADDRESS": callbacks})
        )
        environment = {
            **os.environ,
            "IDEFICS_BROKER_URL": broker.url,
            "IDEFICS_RESULT_BACKEND": broker.results,
            "IDEFICS_QUEUE_METRICS_ADDRESS": queue,
        }
        exporter = [sys.executable, "-m", "worker.observability.queue"]
        opened.enter_context(stack.started(exporter, log=folder / "queue.log", environment=environment))
        command = ["prometheus", f"--config.file={_configured(folder, [worker, callbacks, queue])}"]
        command += [f"--web.listen-address={served}", f"--storage.tsdb.path={folder / 'data'}"]
        opened.enter_context(stack.started(command, log=folder / "prometheus.log"))
        prometheus = Prometheus(served)
        eventually(lambda: (folder / "prometheus.log").read_text().count("ready to receive") and _up(prometheus) == 3)
        client = Client(broker.url, check_callbacks=False)
        _load(client, gallery, receiver)
        os.kill(stood.producer.model_process(), signal.SIGKILL)
        eventually(lambda: bool(prometheus.query("idefics_model_process_restarts_total > 0")))
        # A second load, so that all counters have grown between two scrapes.
        _load(client, gallery, receiver)
        eventually(lambda: bool(prometheus.query('idefics_callbacks{state="delivered"} > 1')))
        yield prometheus


def _configured(folder: Path, targets: list[str]) -> Path:
    path = folder / "prometheus.yaml"
    scrape = {"job_name": "idefics", "scrape_interval": "500ms", "static_configs": [{"targets": targets}]}
    rules = [str(DEPLOY / "prometheus" / "alerts.yaml")]
    often = {"evaluation_interval": "1s"}
    path.write_text(yaml.safe_dump({"global": often, "rule_files": rules, "scrape_configs": [scrape]}))
    return path


def _up(prometheus: Prometheus) -> int:
    return len(prometheus.query("up == 1"))


def _load(client: Client, gallery: Gallery, receiver: Receiver) -> None:
    """Jobs of all kinds: answered, labelled, retried, failed; each of the answered ones with a callback."""
    shown = sorted(path.name for path in PICTURES.glob("1-*.png"))[:4]
    gone, *urls = [f"{receiver.url}/gone", *[receiver.url] * 3]
    jobs = [_captioned(client, shown[0], gone)]
    eventually(lambda: receiver.called("/hook/gone"))
    jobs += [_captioned(client, name, url) for name, url in zip(shown[1:], urls, strict=True)]
    jobs.append(client.submit(Classify(image={"path": shown[0]}, labels=["food", "animal"])))
    jobs.append(client.submit(Complete(prompt=[gallery.broken("broken", 1), "Hello"])))
    jobs.append(client.submit(Caption(image={"path": "none.png"})))
    eventually(lambda: all(job.status in ("succeeded", "failed") for job in jobs))


def _captioned(client: Client, picture: str, url: str) -> SubmittedJob:
    return client.submit(Caption(image={"path": picture}, callback=Callback(url=url, key_id="main")))


@pytest.mark.parametrize("query", queries())
def test_a_curve_of_the_dashboards_has_values(query: str, prometheus: Prometheus) -> None:
    if any(name in query for name in WITHOUT_GPU):
        pytest.skip("needs a GPU")
    assert prometheus.query(query)


def test_prometheus_evaluates_every_alert(prometheus: Prometheus) -> None:
    eventually(lambda: all(rule["health"] == "ok" for rule in prometheus.rules()))
    assert prometheus.rules()
