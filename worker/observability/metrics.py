"""Every metric of the workers: name, meaning, labels. Each is counted where the thing happens.

Both processes of a GPU worker import this module and count in their own copies, which
`worker/observability/exposition.py` adds up. Labels have few values: never a host, an id or a URL. vLLM's names are
used where the thing is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

#: The metrics of a GPU worker, and those of a callbacks worker.
WORKER, CALLBACKS = CollectorRegistry(), CollectorRegistry()

#: Bounds of the buckets of a histogram: seconds, rows, tokens.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1_800)
ROWS = tuple(2**power for power in range(11))
TOKENS = tuple(4**power for power in range(2, 9))

#: The label `task` of a message that is refused before its task is known.
UNKNOWN_TASK = "unknown"


@dataclass(frozen=True, slots=True)
class Definition:
    """A metric's description, for the documentation."""

    name: str
    type: str
    labels: tuple[str, ...]
    meaning: str


#: By registry, in the order of the documentation.
DEFINITIONS: dict[CollectorRegistry, list[Definition]] = {WORKER: [], CALLBACKS: []}

Kind = TypeVar("Kind", bound=MetricWrapperBase)


def _define(kind: type[Kind], name: str, meaning: str, labels: tuple[str, ...], registry: CollectorRegistry) -> None:
    DEFINITIONS[registry].append(Definition(name, kind.__name__.lower(), labels, meaning))


def _counter(name: str, meaning: str, *labels: str, registry: CollectorRegistry = WORKER) -> Counter:
    _define(Counter, name, meaning, labels, registry)
    return Counter(name, meaning, labels, registry=registry)


def _gauge(name: str, meaning: str, *labels: str) -> Gauge:
    _define(Gauge, name, meaning, labels, WORKER)
    return Gauge(name, meaning, labels, registry=WORKER)


def _histogram(
    name: str,
    meaning: str,
    *labels: str,
    buckets: tuple[float, ...] = SECONDS,
    registry: CollectorRegistry = WORKER,
) -> Histogram:
    _define(Histogram, name, meaning, labels, registry)
    return Histogram(name, meaning, labels, buckets=buckets, registry=registry)


@dataclass(frozen=True, slots=True)
class CacheMetrics:
    """How often a cache was asked, and how often it had the answer."""

    queries: Counter
    hits: Counter


def _cache(name: str, what: str) -> CacheMetrics:
    return CacheMetrics(
        _counter(f"idefics_{name}_cache_queries_total", f"{what} that were looked up in the cache."),
        _counter(f"idefics_{name}_cache_hits_total", f"{what} that were found in the cache."),
    )


# The worker and its model

MODEL = _gauge(
    "idefics_model_info",
    "1; the labels describe the model that is served.",
    "id", "revision", "family", "dtype", "quantization", "engine",
)  # fmt: skip
WORKER_STATE = _gauge("idefics_worker_state", "1 for the worker's state, 0 for the others.", "state")

# Jobs now

REQUESTS_RUNNING = _gauge("idefics_num_requests_running", "Rows in the batch.")
REQUESTS_WAITING = _gauge("idefics_num_requests_waiting", "Rows that wait for the batch or for their features.")
JOBS_IN_FLIGHT = _gauge("idefics_num_jobs_in_flight", "Jobs that this worker has taken and that have not ended.")
JOBS_LOADING_IMAGES = _gauge("idefics_num_jobs_loading_images", "Jobs whose images are being fetched and decoded.")
WAITING_FOR_HOST = _gauge(
    "idefics_num_jobs_waiting_for_host", "Jobs that wait for a slot of an image's host, in a thread or parked."
)

# Jobs that ended

JOBS = _counter(
    "idefics_jobs_total",
    "Jobs that ended here: succeeded, failed (with the error's code), canceled, expired, or returned to the queue.",
    "task", "state", "code",
)  # fmt: skip
RETRIES = _counter(
    "idefics_job_retries_total",
    "Runs that ended with another run to come, by the error's code. Without a code: the job waits for the first job "
    "with its idempotency key, because its campaign is paused, or for a host for which too many jobs are parked.",
    "task", "code",
)  # fmt: skip
E2E_SECONDS = _histogram(
    "idefics_e2e_request_latency_seconds",
    "Seconds from the submission of a job that succeeded or failed to its end, where the message has the time of its "
    "submission.",
    "task",
)
TIME_TO_FIRST_TOKEN = _histogram(
    "idefics_time_to_first_token_seconds", "Seconds from the arrival of a row in the engine to its first new token."
)
STAGE_SECONDS = _histogram(
    "idefics_request_stage_seconds",
    "Seconds of a job in each stage: queued (submitted to begun), fetch (its images), decode (its images), encode (its "
    "row waits for its pictures' features), wait (its row waits for the batch), generate.",
    "stage",
)
STAGES = {stage: STAGE_SECONDS.labels(stage) for stage in ("queued", "fetch", "decode", "encode", "wait", "generate")}
PROMPT_TOKENS = _counter("idefics_prompt_tokens_total", "Tokens of the prompts of jobs that were answered.")
GENERATION_TOKENS = _counter("idefics_generation_tokens_total", "New tokens of jobs that were answered.")
IMAGES = _counter("idefics_images_total", "Images of jobs that were answered.")

# The engine

ENGINE_SECONDS = _counter(
    "idefics_engine_seconds_total",
    "Seconds of the engine's thread in each phase; encode: also those of the encoder's own thread, at the same time. "
    "idle: it waits for rows.",
    "phase",
)
PHASES = {phase: ENGINE_SECONDS.labels(phase) for phase in ("prefill", "decode", "score", "encode", "idle")}
STEPS = _counter("idefics_engine_steps_total", "Steps, each of which gives every running row a token.")
STEP_ROWS = _histogram("idefics_engine_step_rows", "Rows of a step.", buckets=ROWS)
STEP_TOKENS = _histogram(
    "idefics_engine_step_tokens",
    "Tokens of the prompts that are prefilled together, without their cached prefixes.",
    buckets=TOKENS,
)
MAX_ROWS = _gauge("idefics_engine_max_rows", "Rows that the batch may have now: fewer after memory was short.")

# Caches

PICTURE_CACHE = _cache("picture", "Image files")
PICTURE_CACHE_BYTES = _gauge("idefics_picture_cache_bytes", "Bytes of decoded pictures in memory.")
ENCODER_CACHE = _cache("encoder", "Pictures of rows")
ENCODER_CACHE_BYTES = _gauge("idefics_encoder_cache_bytes", "Bytes of pictures' features on the device.")
#: As vLLM counts them.
PREFIX_CACHE = _cache("prefix", "Tokens of prompts")
PREFIX_CACHE_BYTES = _gauge("idefics_prefix_cache_bytes", "Bytes of prefixes' keys and values.")
ANSWER_CACHE = _cache("answer", "Jobs whose answer may be shared")

# Keys and values

KV_USAGE = _gauge("idefics_gpu_cache_usage_perc", "Share of the room for keys and values that is in use, 0 to 1.")
KV_BYTES = _gauge("idefics_kv_cache_bytes", "Bytes that are allocated for keys and values.")
PREEMPTIONS = _counter(
    "idefics_num_preemptions_total", "Rows that were interrupted since there was no room for keys and values."
)

# Faults

RESTARTS = _counter(
    "idefics_model_process_restarts_total",
    "Model processes that were replaced: hung, load_timeout, time_limit, device_lost, killed (signal 9, as when memory "
    "runs out), crashed (another signal), exited.",
    "cause",
)
QUARANTINED = _counter("idefics_quarantined_jobs_total", "Jobs that run again apart, since their process died.")
REDELIVERIES = _counter(
    "idefics_redeliveries_total",
    "Jobs taken that another worker had lost: it died, froze or was cut off.",
)
DEAD_LETTERS = _counter(
    "idefics_dead_letters_total", "Failed jobs and messages that were kept on the list of failed jobs."
)

# Answers

ABSTAINED = _counter(
    "idefics_abstained_total", "Jobs whose answer was less sure than their `min_confidence` (`abstained`).", "task"
)
CANARY_RUNS = _counter(
    "idefics_canary_runs_total",
    "Jobs that ran again alone (IDEFICS_CANARY): identical, diverged (another answer), dropped (too many waited, or "
    "others came), failed.",
    "outcome",
)
CANARY = {outcome: CANARY_RUNS.labels(outcome) for outcome in ("identical", "diverged", "dropped", "failed")}

# Devices

GPU_MEMORY = _gauge("idefics_gpu_memory_bytes", "Memory of a GPU: used (by all processes) and total.", "gpu", "kind")
GPU_UTILIZATION = _gauge("idefics_gpu_utilization_ratio", "Share of time in which a GPU runs kernels, 0 to 1.", "gpu")
RESIDENT_MEMORY = _gauge("idefics_model_process_resident_memory_bytes", "Resident memory of the model process.")

# The callbacks worker

CALLBACK_ATTEMPTS = _counter(
    "idefics_callback_attempts_total",
    "POSTs: accepted (2xx), rejected (another status), unreachable (no answer), forbidden (by this worker's settings).",
    "result",
    registry=CALLBACKS,
)
CALLBACK_DELIVERIES = _counter(
    "idefics_callbacks_total",
    "Callbacks that ended: delivered or failed. A batch counts once.",
    "state",
    registry=CALLBACKS,
)
CALLBACK_SECONDS = _histogram("idefics_callback_attempt_seconds", "Seconds of one POST.", registry=CALLBACKS)
