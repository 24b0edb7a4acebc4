"""The worker's settings: environment variables with the prefix `IDEFICS_`, read once, frozen.

`python -m config` prints those in force, with secrets masked.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, FilePath, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from config.injected import is_injected
from config.parsing import (
    CommaSeparated,
    Networks,
    Ports,
    Seconds,
    Steps,
    holding_certificates,
    is_secret,
    listen_address,
    naming_a_function,
    split,
)
from tasks.redis_urls import NOT_CERTAIN, Server, result_server, results_beside, server

PREFIX = "IDEFICS_"
DEFAULT_BROKER = "redis://localhost:6379/0"


class Settings(BaseSettings):
    """Every setting with its unit and reason. An unknown `IDEFICS_` name is refused, since it is probably misspelt.

    An empty value means the default. The docstring below a field is its description, also in the documentation.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="forbid",
        env_ignore_empty=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    broker_url: SecretStr = SecretStr(DEFAULT_BROKER)
    """URL of the Redis that holds the queues. Secret, since it may contain a password."""
    result_backend: SecretStr = SecretStr("")
    """URL of the Redis that holds the results. Default: the database after the broker's, if the broker is a single
    redis:// or rediss:// address; otherwise it is required."""
    sentinel_master: str = ""
    """Name of the Sentinel master, for sentinel:// URLs without ?master_name=."""
    sentinel_password: SecretStr = SecretStr("")
    """Password of the sentinels, if they require one. The password in the URL is the Redis server's."""

    queue: str = Field(default="idefics", min_length=1, max_length=200, pattern=r"^idefics(\.[\w-]+)*$")
    """Queue that the worker takes jobs from. If several models share a broker, each has one of its own, such as
    `idefics.large`: then the model's name is `large`, and producers choose it with `Client(model="large")` or Celery's
    `queue="idefics.large"`."""

    default_queue: str = Field(default="celery", min_length=1, max_length=200, pattern=r"^[\w.:@/-]+$")
    """Queue for links, errbacks, and the later tasks of chains and chords that name no queue. Set it to the
    `task_default_queue` of your producers' app if that is not Celery's default."""

    priority_separator: str = Field(default="", max_length=8)
    """Text before the priority's digit in the names of a queue's lists, if your producers set kombu's `sep`. Empty:
    kombu's default. Lists with kombu's default and with `:`, which Celery's guide recommends, are always read."""
    priority_steps: Steps = tuple(range(10))
    """Priorities that have their own lists. If your producers set kombu's `priority_steps`, they must be among
    these."""
    broker_key_prefix: str = Field(default="", max_length=200)
    """Prefix of all keys in the broker's Redis: your producers' `global_keyprefix` in broker_transport_options."""
    result_key_prefix: str = Field(default="", max_length=200)
    """Prefix of all keys in the results' Redis: your producers' `global_keyprefix` in
    result_backend_transport_options."""

    atomic_reserve: bool = True
    """Take jobs from Redis with one Lua script, and keep jobs with a countdown in Redis until they are due. False:
    kombu's own way, for brokers without scripts; a worker that dies while it takes a job then loses it, and jobs with a
    countdown fill its memory."""

    model: str = "demo"
    """Hub id, folder, or one of the checkpoints in worker/demo: `demo` (IDEFICS) or `demo-smolvlm` (SmolVLM). `fake`
    answers without a model, for tests; `fake:0.05` takes that many seconds for each token."""
    model_revision: str | None = None
    """Commit of the hub repository. Pin it so that the weights change only when you change it."""
    offline: bool = False
    """Load the model from the local hub cache only, never from the network."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights' precision. `auto`: the checkpoint's own on a GPU, float32 on a CPU."""
    quantization: Literal["none", "4bit", "8bit"] = "none"
    """Weight quantization, by bitsandbytes."""
    device_map: str = "auto"
    """Device, as transformers' `device_map`. `auto`: the first visible GPU, and further ones if the model does not fit;
    without a GPU the CPU."""
    calibration: FilePath | None = None
    """File that `idefics-jobs calibrate` wrote for this model: results then have a calibrated `confidence`, and the
    model's own as `raw_confidence`."""

    max_batch_size: int = Field(default=64, ge=1, le=1024)
    """Jobs that the model runs at the same time."""
    max_batch_tokens: int = Field(default=65_536, ge=1)
    """Tokens in the batch, prompts, answers and padding together: the bound on its memory. In blocks (kv_layout) there
    is no padding, and on a GPU the bound is what fits into its memory, unless this is set to less."""
    max_prompt_tokens: int = Field(default=0, ge=0)
    """Tokens in a prompt. A longer one is refused, since truncating could remove images. 0: what the model reads (its
    `max_position_embeddings`), at most max_batch_tokens."""
    max_new_tokens: int = Field(default=512, ge=1)
    """New tokens that one job may ask for. A job that asks for more is refused."""
    default_new_tokens: int = Field(default=64, ge=1)
    """New tokens for a job that does not set `max_new_tokens`."""
    max_images: int = Field(default=32, ge=1)
    """Images in one job."""
    max_job_bytes: int = Field(default=32_000_000, ge=1_000)
    """Bytes of a job's message, pictures in data: URIs included. A worker needs as much memory for each job that it
    holds."""
    prefetch: int = Field(default=0, ge=0)
    """Jobs that the worker holds at the same time: some load their images while others run. 0: three times
    max_batch_size."""
    torch_threads: int = Field(default=0, ge=0)
    """Torch threads for each of the two computing threads (decoder, image encoder), on a CPU only. 0: half of the
    cores."""

    image_allow_networks: Networks = ()
    """Private networks that images may be downloaded from, such as 10.1.0.0/16."""
    image_allow_domains: CommaSeparated = ()
    """If set, images are downloaded from these hosts and their subdomains only."""
    image_ports: Ports = (80, 443)
    """Ports that images may be downloaded from."""
    image_max_bytes: int = Field(default=20_000_000, ge=1)
    """Bytes of one image. Beyond 2 MB, all downloads together are limited to 15 MB a second for each core."""
    image_max_pixels: int = Field(default=64_000_000, ge=1, le=178_000_000)
    """Pixels of one image; phones make 50 million. A JPEG of more than 40 million is decoded at half size or less;
    other formats need up to 16 bytes of memory for each pixel. Pillow itself refuses more than 178 million."""
    image_timeout_s: float = Field(default=20.0, gt=0)
    """Seconds to download one image, everything included."""
    image_max_redirects: int = Field(default=5, ge=0, le=20)
    """Redirects followed for one image. Each target is checked like the first URL."""
    ca_file: Annotated[FilePath, AfterValidator(holding_certificates)] | None = None
    """PEM file with additional certificate authorities, for images and callbacks inside your network. Public
    authorities stay trusted."""
    image_host_concurrency: int = Field(default=8, ge=1)
    """Simultaneous downloads from one host by this worker, so that a bulk job does not overload a site and a slow site
    does not hold all threads."""
    image_host_shared: int = Field(default=32, ge=0)
    """Simultaneous downloads from one host by all workers of the broker together, so that a site is asked no more often
    when workers are added. Raise it for a host of your own that can take more. Set it to image_host_concurrency if the
    sites are strangers'. 0: each worker keeps to its own limit only."""
    image_jobs: int = Field(default=0, ge=0)
    """Jobs that download images at the same time, from any host, so that hosts that hang do not hold all threads. 0: a
    third of the jobs that the worker holds."""
    image_retry_after_max_s: float = Field(default=300.0, ge=0)
    """Longest wait in seconds when an image's server sends Retry-After: before this job's retry, and before any worker
    asks that host for another image."""
    image_respect_noai: bool = False
    """Refuse images whose server forbids their use by AI (`X-Robots-Tag: noai` or `noimageai`). Off by default: the
    header is about training, and most jobs show pictures of their own. Switch it on for pictures of strangers."""
    contact: str | None = Field(default=None, max_length=200, pattern=r"^[ -'*-~]+$")
    """Your URL or e-mail address, sent in the User-Agent to the servers that images are downloaded from."""
    image_root: Path | None = None
    """Folder for {"path": ...} images. Unset: such images are refused."""

    image_cache_bytes: int = Field(default=2**28, ge=0)
    """Bytes of decoded images kept in memory, so that an image used by several jobs is decoded once."""
    feature_cache_bytes: int = Field(default=2**29, ge=0)
    """Bytes of image features kept on the device, so that an image used by several jobs is encoded once."""
    prefix_cache_bytes: int = Field(default=2**29, ge=0)
    """Bytes of shared prompt prefixes (examples, instructions) kept on the device."""
    kv_layout: Literal["auto", "slots", "blocks"] = "auto"
    """Keys and values in slots as long as the batch's longest job, or in blocks: a job costs what it is long, and
    shares the blocks of common prefixes. auto: blocks on a GPU; slots on a CPU, where blocks take longer."""
    kv_bytes: int = Field(default=0, ge=0)
    """Bytes of blocks. 0: on a GPU, what its largest work leaves, measured at start; on a CPU, for max_batch_tokens."""
    cuda_graphs: bool = False
    """Record a decode step once for each shape and replay it, which saves the launch of each kernel on a GPU. Not yet
    tried on a GPU, so off by default."""

    callback_keys: Annotated[dict[str, tuple[SecretStr, ...]], NoDecode] = {}
    """`id=whsec_...` pairs: the secrets that sign callbacks. An id given twice signs with both, for rotation."""
    callback_allow_http: bool = False
    """Allow callbacks to http:// URLs. Off by default: their content could be read on the way."""
    callback_allow_networks: Networks = ()
    """Private networks that callbacks may go to, such as 10.1.0.0/16."""
    callback_allow_domains: CommaSeparated = ()
    """If set, callbacks go to these hosts and their subdomains only."""
    callback_ports: Ports = (80, 443)
    """Ports that callbacks may go to."""
    callback_timeout_s: float = Field(default=15.0, gt=0)
    """Seconds for one attempt, everything included."""
    callback_schedule_s: Seconds = (0, 5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
    """Seconds before each attempt, counted from the attempt before, with jitter. The number of entries is the number of
    attempts."""
    callback_concurrency: int = Field(default=16, ge=1, le=1_024)
    """Simultaneous attempts in one callbacks worker: at most a quarter of them to one host, and at most half to hosts
    that have not answered recently, so that hosts that hang do not delay the others."""
    callback_batch_window_s: float = Field(default=0.0, ge=0)
    """Seconds that a first attempt waits for others to the same URL, to be sent as one `job.batch`. 0: no batches."""
    callback_batch_max: int = Field(default=100, ge=2, le=1_000)
    """Events in one `job.batch`, which is also limited to 20 kB."""
    callback_keep_s: int = Field(default=86_400, ge=1)
    """Seconds that a finished delivery is listed and can be replayed."""
    callback_max_host_bytes: int = Field(default=2**26, ge=2**16)
    """Bytes of pending callbacks to one host in the broker's Redis. Beyond it the oldest are given up unsent and listed
    as failed, so that a receiver that is down for days does not fill the server."""
    callback_max_pending_bytes: int = Field(default=2**28, ge=2**16)
    """Bytes of pending callbacks to all hosts together. Beyond it the oldest are given up, as for one host."""
    callback_disabled_s: int = Field(default=604_800, ge=1)
    """Seconds that a URL which answered 410 (Gone) gets no callbacks."""

    result_ttl_s: int = Field(default=86_400, ge=1)
    """Seconds that a result is kept."""
    idempotency_ttl_s: int = Field(default=0, ge=0)
    """Seconds that an idempotency key is remembered: at most result_ttl_s, since its result must still be there. 0:
    result_ttl_s."""
    answer_cache_ttl_s: int = Field(default=0, ge=0)
    """Seconds that an answer is reused for identical jobs (same pixels, prompt, sampling and model), greedy or seeded
    ones only; identical jobs that run at the same time share one row of the batch. 0: off, since a fast answer can
    reveal what others asked."""
    canary: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the jobs, such as 0.001, that run again alone while the worker is idle, to see whether their answers
    depend on the jobs beside them. The metric `idefics_canary_runs_total` counts the outcomes. 0: off."""
    time_limit_s: float = Field(default=600.0, gt=0)
    """Seconds after which a running job is given up: its model process is replaced and the other jobs in it run again.
    A message may set a lower limit (Celery's `time_limit`); then only its job ends."""
    soft_time_limit_s: float = Field(default=540.0, gt=0)
    """Seconds after which a running job ends with the text generated so far."""
    load_timeout_s: float = Field(default=1_800.0, gt=0)
    """Seconds for the model to download, load and answer its golden questions."""
    hang_timeout_s: float = Field(default=300.0, ge=2)
    """Seconds without a heartbeat from the engine after which the model process is replaced. Must be longer than the
    engine's longest step."""
    restart_backoff_s: float = Field(default=1.0, ge=0)
    """Seconds before a model process that died while loading is started again. The wait grows fourfold, three times."""
    soft_shutdown_timeout_s: float = Field(default=60.0, ge=0)
    """Seconds that a worker stopped by SIGQUIT waits for its running jobs before they return to the queue. SIGTERM
    waits until all have ended; with REMAP_SIGTERM=SIGQUIT it is the same as SIGQUIT."""
    max_retries: int = Field(default=3, ge=0)
    """Retries of a job after a temporary error (unreachable image, lost worker, out of memory)."""
    retry_backoff_s: float = Field(default=2.0, ge=0)
    """Seconds before the first retry; doubled for each further one, with jitter."""
    max_worker_deaths: int = Field(default=3, ge=2)
    """Deaths of a whole worker during one job after which that job fails as worker_lost. Before the last one it runs
    alone, so that a job is not blamed for another one's crash."""
    redis_wait_s: float = Field(default=300.0, gt=0)
    """Seconds that a running job waits for a Redis that is away or refuses writes (full, read-only, out of connections)
    before it returns to the queue. Result, links, retries and callback wait with it. This does not count as running
    time."""
    visibility_timeout_s: int = Field(default=3_600, ge=1)
    """Seconds after which the jobs of a worker that died are delivered again. A live worker renews its claim every
    quarter of this time, or every 10 s, so it may be short (60), but must exceed any pause of your network or Redis.
    With atomic_reserve=false nothing is renewed: then it must exceed the longest job."""

    failed_max: int = Field(default=10_000, ge=0)
    """Failed jobs kept with their payload, to be inspected and retried (`idefics-jobs failed`)."""
    failed_max_bytes: int = Field(default=2**28, ge=0)
    """Bytes of all kept failed jobs, in the results' Redis. Pictures sent as data: URIs are large."""
    failed_ttl_s: int = Field(default=1_209_600, ge=1)
    """Seconds that a failed job is kept. Default: two weeks."""

    review_max: int = Field(default=10_000, ge=0)
    """Doubtful answers, of jobs with `min_confidence`, that are kept for a person to decide (`idefics-jobs review`),
    decisions included. The oldest are dropped first. 0: none are kept."""
    review_max_bytes: int = Field(default=2**28, ge=0)
    """Bytes of all kept doubtful answers, in the results' Redis. Each has small copies of its pictures, of 20 to 100 kB
    each, until it is decided."""
    review_ttl_s: int = Field(default=604_800, ge=1)
    """Seconds that a doubtful answer waits for a decision, and that a decision is kept. Default: a week."""

    state_file: Path | None = None
    """File with the worker's state, read by `python -m worker.health`; one for each worker. Unset: a file in the
    temporary directory, where the probe looks."""

    metrics_address: Annotated[str, AfterValidator(listen_address)] = ""
    """Address where this worker serves its metrics to Prometheus, as `127.0.0.1:9101`. A port alone listens on
    127.0.0.1 only; name `0.0.0.0` for other machines, in a private network, since there is no login. Each worker of a
    machine needs a port of its own. Empty: not served."""

    queue_metrics_address: Annotated[str, AfterValidator(listen_address), Field(min_length=1)] = "127.0.0.1:9102"
    """Address where the queue exporter (`python -m worker.observability.queue`) serves its metrics to Prometheus. A
    port alone listens on 127.0.0.1 only; name `0.0.0.0` for other machines, in a private network, since there is no
    login."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    """Level of the worker's log. `--loglevel` on Celery's command line takes precedence."""
    log_format: Literal["text", "json"] = "text"
    """`json`: one object a line, for programs that collect logs, with the job's id, task and error code."""
    traces: Literal["off", "otlp"] = "off"
    """`otlp`: send traces of jobs and callbacks over OTLP, set up by OpenTelemetry's own variables such as
    OTEL_EXPORTER_OTLP_ENDPOINT and OTEL_TRACES_SAMPLER. Needs the extra `otel`."""
    setup: Annotated[str, AfterValidator(naming_a_function)] = ""
    """A function of yours, as `module:function`, that is called once in each process of a worker, before the model
    loads: to start Sentry or another SDK, or to add a log handler. If it requires an argument, it gets the process's
    name: `parent`, `model` or `callbacks`; `queue` in the queue exporter."""

    @model_validator(mode="before")
    @classmethod
    def _results_lie_beside_the_queues(cls, values: dict[str, Any]) -> dict[str, Any]:
        broker = values.get("broker_url") or DEFAULT_BROKER
        url = broker.get_secret_value() if isinstance(broker, SecretStr) else str(broker)
        try:
            return {"result_backend": results_beside(url), **values}
        except ValueError:
            # `_servers_are_known` reports it, after errors of the broker's own URL.
            return values

    @model_validator(mode="after")
    def _servers_are_known(self) -> Settings:
        for name in ("broker_url", "result_backend"):
            url = getattr(self, name).get_secret_value()
            if not url:
                raise ValueError(f"{PREFIX}{name.upper()} is needed: {NOT_CERTAIN}")
            try:
                _ = self.broker if name == "broker_url" else self.results
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return self

    @field_validator("callback_keys", mode="before")
    @classmethod
    def _keys_by_id(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        pairs = [item.partition("=") for item in split(value)]
        if any(not name or not is_secret(secret) for name, _, secret in pairs):
            raise ValueError("comma-separated id=whsec_... pairs, each secret whsec_ and the base64 of 24 to 64 bytes")
        keys: dict[str, tuple[str, ...]] = {}
        for name, _, secret in pairs:
            keys[name] = (*keys.get(name, ()), secret)
        return keys

    @field_validator("queue")
    @classmethod
    def _queue_is_for_jobs(cls, value: str) -> str:
        if value == "idefics.callbacks":
            raise ValueError("idefics.callbacks is the callbacks worker's own queue: name another, as idefics.large")
        return value

    @model_validator(mode="after")
    def _limits_fit(self) -> Settings:
        if self.soft_time_limit_s >= self.time_limit_s:
            raise ValueError("soft_time_limit_s must be below time_limit_s")
        if self.idempotency_ttl_s > self.result_ttl_s:
            raise ValueError("idempotency_ttl_s must be at most result_ttl_s")
        return self

    @property
    def broker(self) -> Server:
        """The queues' Redis, in Celery's words."""
        return server(self.broker_url.get_secret_value(), self.sentinel_master, self._sentinel_password)

    @property
    def results(self) -> Server:
        """The results' Redis, in Celery's words."""
        return result_server(self.result_backend.get_secret_value(), self.sentinel_master, self._sentinel_password)

    @property
    def _sentinel_password(self) -> str:
        return self.sentinel_password.get_secret_value()

    @property
    def job_threads(self) -> int:
        """Jobs that the model process holds at once: some wait for images while others compute."""
        return self.prefetch or 3 * self.max_batch_size

    @property
    def image_job_concurrency(self) -> int:
        """Jobs that load images from the network at once."""
        return self.image_jobs or max(1, self.job_threads // 3)


#: Old names of settings, without the prefix, and their fields. They are read if the new name is not set.
RENAMED = {
    "ATOMIC_TAKE": "atomic_reserve",
    "IMAGE_HOST_TURNS": "image_host_concurrency",
    "MAX_DELIVERIES": "max_worker_deaths",
}


def load() -> Settings:
    """The settings of this environment. Raises ValueError for an unknown `IDEFICS_` name."""
    known = {PREFIX + name for name in (*map(str.upper, Settings.model_fields), *RENAMED)}
    others = {name: value for name, value in os.environ.items() if name.startswith(PREFIX) and name not in known}
    unknown = sorted(name for name, value in others.items() if not is_injected(name[len(PREFIX) - 1 :], value))
    if unknown:
        raise ValueError(f"Unknown settings: {', '.join(unknown)}. `python -m config` lists all.")
    return Settings(**_renamed())


def _renamed() -> dict[str, Any]:
    """The values that this environment has under old names only, by field."""
    return {
        field: value
        for old, field in RENAMED.items()
        if (value := os.environ.get(PREFIX + old)) and not os.environ.get(PREFIX + field.upper())
    }
