"""Metrics of real workers, scraped over HTTP: jobs on the bundled model, a killed model process, callbacks, a stop."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tasks import Callback, Caption, Classify, Client, Complete, JobError, SubmittedJob
from tests.conftest import PICTURES, callback_settings
from tests.support.gallery import Gallery
from tests.support.receiver import Receiver
from tests.support.stand import Stand, callbacks_worker, plain_stand
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack
from worker.engine.prefix_cache import MIN_TOKENS
from worker.observability.metrics import CALLBACKS, DEFINITIONS, UNKNOWN_TASK, WORKER

SHOWN = sorted(path.name for path in PICTURES.glob("1-*.png"))
#: Jobs of the load: captions of a picture each, captions after an example and with beams (see `few_shot_and_beams`).
CAPTIONS, FEW_SHOT, BEAMS = 12, 3, 1
#: With a classification, a caption of the first picture again, and the job that waits for its picture's host.
ANSWERED = CAPTIONS + FEW_SHOT + BEAMS + 3
#: An example is a picture, too.
IMAGES = ANSWERED + FEW_SHOT
#: Tokens that each caption may have.
TOKENS = 6


@dataclass(frozen=True)
class Metrics:
    """A worker's metrics, as Prometheus reads them."""

    address: str

    def text(self) -> str:
        with urlopen(f"http://{self.address}/metrics", timeout=5) as response:
            return str(response.read().decode())

    def samples(self) -> dict[str, float]:
        return samples(self.text())

    def value(self, sample: str) -> float:
        return self.samples().get(sample, 0.0)

    def jobs(self) -> dict[str, float]:
        """Ended jobs by task, state and code."""
        return {
            name.removeprefix("idefics_jobs_total"): value
            for name, value in self.samples().items()
            if name.startswith("idefics_jobs_total{") and value
        }


#: A metric at the end of a scrape: without it the process has ended meanwhile.
LAST = "\nprocess_max_fds "

#: The names of labels by the metric's.
LABELS = {
    each.name.removesuffix("_total"): each.labels for registry in (WORKER, CALLBACKS) for each in DEFINITIONS[registry]
}


def samples(text: str) -> dict[str, float]:
    """The values by name and labels, as `name{a,b}`: labels in the order of their definition."""
    return {
        f"{sample.name}{{{_labels(family.name, sample.labels)}}}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _labels(metric: str, labels: Mapping[str, str]) -> str:
    order = [*LABELS.get(metric, ()), *labels]
    return ",".join(labels[name] for name in dict.fromkeys(order))


#: Longer than from one report of the model process to the next.
REPORTED_S = 3.0


def at_rest(metrics: Metrics) -> dict[str, float]:
    """The samples when nothing more is counted: one report may have only a part of what a job's end counts."""
    end = time.monotonic() + PATIENCE_S
    samples = metrics.samples()
    while time.monotonic() < end:
        time.sleep(REPORTED_S)
        before, samples = samples, metrics.samples()
        if _counts(before) == _counts(samples):
            return samples
    pytest.fail("the worker counts on and on")


def _counts(samples: Mapping[str, float]) -> dict[str, float]:
    """The counted values, but the engine's seconds: it is idle meanwhile."""
    return {name: value for name, value in samples.items() if _is_counted(name) and not name.startswith(ENGINE_SECONDS)}


ENGINE_SECONDS = "idefics_engine_seconds_total"


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    return Metrics(f"127.0.0.1:{stack.free_port()}")


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    """A receiver of callbacks that refuses the first one."""
    with Receiver(answers=[500]).open() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def stood(metrics: Metrics, receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """A worker with the bundled model, whose answers are shared and whose image hosts serve one job at a time."""
    settings = {
        "MODEL": "demo",
        "PREFETCH": "32",
        "IMAGE_ROOT": str(PICTURES),
        "IMAGE_HOST_CONCURRENCY": "1",
        "ANSWER_CACHE_TTL_S": "60",
        "MAX_RETRIES": "1",
        "METRICS_ADDRESS": metrics.address,
        **callback_settings(receiver.port),
    }
    log = tmp_path_factory.mktemp("metrics") / "log"
    with Gallery().open() as gallery, stack.broker() as server, plain_stand(server, gallery, log, **settings) as stood:
        yield stood


@pytest.fixture(scope="module")
def client(stood: Stand) -> Client:
    return Client(stood.producer.server.url)


def outcome(job: SubmittedJob) -> str:
    try:
        return str(job.result(timeout=PATIENCE_S).finish_reason)
    except JobError as error:
        return error.code


def show(picture: str) -> Caption:
    return Caption(image={"path": picture}, max_new_tokens=TOKENS)


def few_shot_and_beams() -> list[Caption]:
    """Jobs about pictures that were shown before: three with the same example, one with beams."""
    example = {"image": {"path": SHOWN[0]}, "text": "A picture."}
    shown = [Caption(image={"path": name}, examples=[example], max_new_tokens=TOKENS) for name in SHOWN[1:4]]
    return [*shown, Caption(image={"path": SHOWN[4]}, num_beams=2, max_new_tokens=TOKENS)]


@pytest.fixture(scope="module")
def before(stood: Stand, metrics: Metrics) -> Mapping[str, float]:
    """What is counted before the first job: the check of the model's golden answers."""
    eventually(lambda: metrics.value("idefics_worker_state{ready}") and metrics.value("idefics_engine_max_rows{}"))
    return metrics.samples()


@pytest.fixture(scope="module")
def load(before: Mapping[str, float], stood: Stand, client: Client, metrics: Metrics) -> Mapping[str, float]:
    """The metrics after jobs of all kinds, as differences from those before."""
    jobs = client.submit_many(map(show, SHOWN[:CAPTIONS]))
    jobs.append(client.submit(Classify(image={"path": SHOWN[0]}, labels=["food", "animal", "thing"])))
    results = [job.result(timeout=PATIENCE_S) for job in jobs]
    # The first caption's answer is kept, and its picture.
    results.append(client.submit(show(SHOWN[0])).result(timeout=PATIENCE_S))
    results += [client.submit(job).result(timeout=PATIENCE_S) for job in few_shot_and_beams()]
    failures = [
        client.submit(Caption(image={"path": "none.png"})),
        client.submit(Caption(image="http://10.0.0.1/a.png")),
        client.submit(Complete(prompt=["Hello"], max_new_tokens=100_000)),
        client.submit(Complete(prompt=[stood.gallery.broken("broken", 9), "Hello"])),
    ]
    assert [outcome(job) for job in failures] == [
        "image_invalid", "image_blocked", "invalid_request", "image_unreachable",
    ]  # fmt: skip
    expired = client.submit(show(SHOWN[0]), expires=-10.0)
    with stood.producer.app.connection() as connection:
        connection.SimpleQueue("idefics").put({"garbage": True})
    canceled = client.submit(Complete(prompt=[stood.gallery.held("canceled"), "Hello"]))
    stood.gallery.await_requests("canceled")
    eventually(lambda: metrics.value("idefics_num_jobs_loading_images{}") == 1)
    waiting = client.submit(Complete(prompt=[stood.gallery.picture("waiting"), "Hello"], max_new_tokens=3))
    eventually(lambda: metrics.value("idefics_num_jobs_waiting_for_host{}") == 1)
    canceled.cancel()
    stood.gallery.release("canceled")
    results.append(waiting.result(timeout=PATIENCE_S))
    eventually(lambda: metrics.value("idefics_jobs_total{idefics.complete,canceled,}"))
    for job in (canceled, expired):
        assert job.status == "canceled"
    after = at_rest(metrics)
    assert after["idefics_images_total{}"] == IMAGES
    assert after["idefics_prompt_tokens_total{}"] == sum(each.usage.prompt_tokens for each in results)
    assert after["idefics_generation_tokens_total{}"] == sum(each.usage.completion_tokens for each in results)
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def test_every_metric_of_a_worker_is_served(load: Mapping[str, float], metrics: Metrics) -> None:
    families = {family.name for family in text_string_to_metric_families(metrics.text())}
    # A worker without a GPU.
    missing = {each.name.removesuffix("_total") for each in DEFINITIONS[WORKER]} - families
    assert missing == set()
    assert {"process_cpu_seconds", "process_resident_memory_bytes"} <= families


def test_each_job_is_counted_by_its_state_and_code(load: Mapping[str, float], metrics: Metrics) -> None:
    assert metrics.jobs() == {
        "{idefics.caption,succeeded,}": CAPTIONS + 1 + FEW_SHOT + BEAMS,
        "{idefics.classify,succeeded,}": 1,
        "{idefics.complete,succeeded,}": 1,
        "{idefics.caption,failed,image_invalid}": 1,
        "{idefics.caption,failed,image_blocked}": 1,
        "{idefics.complete,failed,invalid_request}": 1,
        "{idefics.complete,failed,image_unreachable}": 1,
        "{idefics.caption,expired,}": 1,
        "{idefics.complete,canceled,}": 1,
        f"{{{UNKNOWN_TASK},failed,invalid_request}}": 1,
    }
    assert load["idefics_job_retries_total{idefics.complete,image_unreachable}"] == 1
    assert load["idefics_dead_letters_total{}"] == 5
    assert load["idefics_e2e_request_latency_seconds_count{idefics.caption}"] == CAPTIONS + 1 + FEW_SHOT + BEAMS + 2


def test_the_stages_of_jobs_are_timed(load: Mapping[str, float]) -> None:
    counts = {
        stage: load[f"idefics_request_stage_seconds_count{{{stage}}}"]
        for stage in ("fetch", "decode", "encode", "wait", "generate")
    }
    # The canceled job's picture came, too.
    loaded = ANSWERED + 1
    assert counts == {"fetch": loaded, "decode": loaded, "encode": ANSWERED, "wait": ANSWERED, "generate": ANSWERED}
    for stage in ("queued", "fetch", "decode", "encode", "generate"):
        assert 0 < load[f"idefics_request_stage_seconds_sum{{{stage}}}"] < PATIENCE_S, stage
    # The classified row has no token, beams have none before they end, and the second answer of a caption was kept.
    assert load["idefics_time_to_first_token_seconds_count{}"] == ANSWERED - 3


def test_caches_count_queries_and_hits(load: Mapping[str, float], metrics: Metrics) -> None:
    # With the canceled job's, which is another job's, too. The pictures of 3 + FEW_SHOT + BEAMS jobs were known.
    assert load["idefics_picture_cache_queries_total{}"] == IMAGES + 1
    known = 2 + 2 * FEW_SHOT + BEAMS
    assert load["idefics_picture_cache_hits_total{}"] == known + 1
    # Kept answers need no features.
    assert load["idefics_encoder_cache_queries_total{}"] == IMAGES - 1
    assert load["idefics_encoder_cache_hits_total{}"] == known - 1
    assert load["idefics_answer_cache_queries_total{}"] == ANSWERED
    assert load["idefics_answer_cache_hits_total{}"] == 1
    # The prefix is kept with the second prompt that begins with it, and found for that and the third.
    hits, queries = (load[f"idefics_prefix_cache_{each}_total{{}}"] for each in ("hits", "queries"))
    assert 2 * MIN_TOKENS <= hits < queries <= load["idefics_prompt_tokens_total{}"]
    assert metrics.value("idefics_prefix_cache_bytes{}") > 0
    assert metrics.value("idefics_picture_cache_bytes{}") > 0
    assert metrics.value("idefics_encoder_cache_bytes{}") > 0


def test_the_engine_counts_its_steps_and_its_time(load: Mapping[str, float], metrics: Metrics) -> None:
    steps = load["idefics_engine_steps_total{}"]
    assert TOKENS <= steps == load["idefics_engine_step_rows_count{}"]
    # Each step gives each of its rows a token; the first token of a row is the prefill's.
    assert load["idefics_engine_step_rows_sum{}"] >= steps
    assert load["idefics_engine_step_rows_bucket{64.0}"] == steps
    assert 0 < load["idefics_engine_step_tokens_sum{}"] <= load["idefics_prompt_tokens_total{}"]
    for phase in ("prefill", "decode", "score", "encode", "idle"):
        assert 0 < load[f"idefics_engine_seconds_total{{{phase}}}"] < PATIENCE_S, phase
    assert metrics.value("idefics_kv_cache_bytes{}") > 0
    assert 0 <= metrics.value("idefics_gpu_cache_usage_perc{}") <= 1
    assert metrics.value("idefics_num_preemptions_total{}") == 0


def test_gauges_say_what_the_worker_does(load: Mapping[str, float], metrics: Metrics) -> None:
    eventually(lambda: metrics.value("idefics_num_jobs_loading_images{}") == 0)
    now = metrics.samples()
    for name in ("requests_running", "requests_waiting", "jobs_in_flight", "jobs_waiting_for_host"):
        assert now[f"idefics_num_{name}{{}}"] == 0, name
    states = {name: value for name, value in now.items() if name.startswith("idefics_worker_state")}
    assert [name for name, value in states.items() if value] == ["idefics_worker_state{ready}"]
    assert [name for name in now if name.startswith("idefics_model_info{") and ",continuous" in name]
    assert now["idefics_engine_max_rows{}"] == 64
    assert now["idefics_model_process_resident_memory_bytes{}"] > 10**8


@pytest.mark.skipif(not shutil.which("promtool"), reason="Debian's package `prometheus` has it")
def test_promtool_finds_no_fault_in_the_metrics(load: Mapping[str, float], metrics: Metrics) -> None:
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=metrics.text(), capture_output=True, text=True, timeout=120
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_port_in_use_ends_the_start_before_the_model_loads(load: Mapping[str, float], stood: Stand) -> None:
    address = f"127.0.0.1:{stood.gallery.port}"
    server = stood.producer.server
    for app in ("worker.app", "worker.callbacks"):
        environment = {**os.environ, "IDEFICS_BROKER_URL": server.url, "IDEFICS_METRICS_ADDRESS": address}
        command = [sys.executable, "-m", "celery", "-A", app, "worker"]
        run = subprocess.run(
            command, cwd=stack.CHECKOUT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert run.returncode != 0
        assert f"IDEFICS_METRICS_ADDRESS={address} cannot be used (Address already in use)" in run.stderr
        assert "Loading" not in run.stdout + run.stderr


def test_a_killed_model_process_leaves_its_counters(
    load: Mapping[str, float], stood: Stand, client: Client, metrics: Metrics
) -> None:
    tokens = metrics.value("idefics_generation_tokens_total{}")
    jobs = client.submit_many(
        Complete(prompt=[stood.gallery.held("killed"), "Hello"], max_new_tokens=3) for _ in range(2)
    )
    stood.gallery.await_requests("killed")
    eventually(lambda: metrics.value("idefics_num_jobs_in_flight{}") == 2)
    process = stood.producer.model_process()
    os.kill(process, signal.SIGKILL)
    stood.gallery.release("killed")
    eventually(lambda: metrics.value("idefics_model_process_restarts_total{killed}") == 1)
    assert metrics.value("idefics_generation_tokens_total{}") == tokens
    assert metrics.value("idefics_num_requests_running{}") == 0
    results = [job.result(timeout=PATIENCE_S) for job in jobs]
    assert 1 <= metrics.value("idefics_quarantined_jobs_total{}") <= 2
    spent = sum(result.usage.completion_tokens for result in results)
    eventually(lambda: metrics.value("idefics_generation_tokens_total{}") >= tokens + spent)
    assert metrics.value("idefics_jobs_total{idefics.complete,succeeded,}") == 3


def test_callbacks_are_counted_by_result_and_state(
    load: Mapping[str, float], receiver: Receiver, stood: Stand, tmp_path: Path
) -> None:
    metrics = Metrics(f"127.0.0.1:{stack.free_port()}")
    settings = {
        **callback_settings(receiver.port),
        "METRICS_ADDRESS": metrics.address,
        "CALLBACK_SCHEDULE_S": "0,0.1",
    }
    client = Client(stood.producer.server.url, check_callbacks=False)
    callback = Callback(url=receiver.url, key_id="main")
    job = client.submit(Complete(prompt=["Hello"], max_new_tokens=3, callback=callback))
    assert job.result(timeout=PATIENCE_S)
    with callbacks_worker(stood.producer.server, tmp_path / "log", settings):
        eventually(lambda: metrics.value("idefics_callbacks_total{delivered}") == 1)
        found = metrics.samples()
        families = {family.name for family in text_string_to_metric_families(metrics.text())}
    assert {each.name.removesuffix("_total") for each in DEFINITIONS[CALLBACKS]} <= families
    assert not [name for name in families if name.startswith("idefics_jobs")]
    assert found["idefics_callback_attempts_total{rejected}"] == 1
    assert found["idefics_callback_attempts_total{accepted}"] == 1
    assert found["idefics_callback_attempt_seconds_count{}"] == 2


def test_during_a_warm_stop_no_counter_goes_back(
    load: Mapping[str, float], stood: Stand, client: Client, metrics: Metrics
) -> None:
    job = client.submit(Complete(prompt=[stood.gallery.held("last"), "Hello"], max_new_tokens=3))
    stood.gallery.await_requests("last")
    scrapes: list[dict[str, float]] = [metrics.samples()]

    def scrape() -> None:
        with contextlib.suppress(URLError, ConnectionError, HTTPException):
            while LAST in (text := metrics.text()):
                scrapes.append(samples(text))

    watcher = threading.Thread(target=scrape)
    stood.process.terminate()
    watcher.start()
    stood.gallery.release("last")
    assert job.result(timeout=PATIENCE_S)
    stood.process.wait(PATIENCE_S)
    watcher.join()
    for earlier, later in itertools.pairwise(scrapes):
        falling = [name for name, value in earlier.items() if _is_counted(name) and later.get(name, 0.0) < value]
        assert falling == []
    last, first = scrapes[-1], scrapes[0]
    done = "idefics_jobs_total{idefics.complete,succeeded,}"
    assert last[done] == first[done] + 1


def _is_counted(name: str) -> bool:
    return name.partition("{")[0].endswith(("_total", "_bucket", "_count", "_sum")) and name.startswith("idefics")
