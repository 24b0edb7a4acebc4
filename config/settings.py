"""The worker's settings: environment variables with the prefix `IDEFICS_`, read once, frozen.

`python -m config` prints those in force, with secrets masked.
"""

from __future__ import annotations

import base64
import os
import re
import ssl
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, FilePath, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from tasks.redis_urls import NOT_CERTAIN, Server, result_server, results_beside, server

PREFIX = "IDEFICS_"
DEFAULT_BROKER = "redis://localhost:6379/0"

Network = IPv4Network | IPv6Network


def _split(value: Any) -> Any:
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return value


def _networks(value: Any) -> Any:
    return [ip_network(item) if isinstance(item, str) else item for item in _split(value)]


def _is_secret(text: str) -> bool:
    """One of Standard Webhooks'."""
    try:
        return text.startswith("whsec_") and 24 <= len(base64.b64decode(text[6:], validate=True)) <= 64
    except ValueError:
        return False


def _holding_certificates(file: Path) -> Path:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=file)
    except OSError:
        raise ValueError("a file of certificates in PEM form, readable by this user") from None
    return file


#: Comma-separated in the environment.
CommaSeparated = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Ports = Annotated[tuple[Annotated[int, Field(ge=1, le=65_535)], ...], NoDecode, BeforeValidator(_split)]
Networks = Annotated[tuple[Network, ...], NoDecode, BeforeValidator(_networks)]
Seconds = Annotated[
    tuple[Annotated[float, Field(ge=0, le=604_800)], ...], NoDecode, BeforeValidator(_split), Field(min_length=1)
]


def _ascending(value: tuple[int, ...]) -> tuple[int, ...]:
    if list(value) != sorted(set(value)) or value[0] != 0:
        raise ValueError("ascending priorities that begin with 0, as 0,3,6,9")
    return value


Steps = Annotated[
    tuple[Annotated[int, Field(ge=0, le=255)], ...],
    NoDecode,
    BeforeValidator(_split),
    Field(min_length=1, max_length=32),
    AfterValidator(_ascending),
]


class Settings(BaseSettings):
    """Every setting with its unit and reason. An unknown `IDEFICS_` name is refused: it is a misspelt one.

    An empty value is the default.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True, hide_input_in_errors=True
    )

    #: Redis that holds the queues. SecretStr, since the URL may carry a password.
    broker_url: SecretStr = SecretStr(DEFAULT_BROKER)
    #: Redis that holds the results; the default is the broker's next database, where the broker is one redis:// or
    #: rediss:// address. Elsewhere it must be given.
    result_backend: SecretStr = SecretStr("")
    #: The master's name, for sentinel:// URLs without ?master_name=.
    sentinel_master: str = ""
    #: What the sentinels ask for, where they ask: the URL's own password is the Redis server's.
    sentinel_password: SecretStr = SecretStr("")

    #: The queue that the worker takes jobs from. One for each model, where several share a broker: `idefics.large`.
    #: Producers name it: `Client(queue=...)`, or Celery's `queue=`.
    queue: str = Field(default="idefics", min_length=1, max_length=200, pattern=r"^idefics(\.[\w-]+)*$")

    #: The queue for links, errbacks, chains and chords' bodies that name none: a stock Celery app's. Set it where your
    #: producers' app has another `task_default_queue`.
    default_queue: str = Field(default="celery", min_length=1, max_length=200, pattern=r"^[\w.:@/-]+$")

    #: What stands before a priority's number in the names of a queue's lists, where producers have set kombu's `sep`.
    #: Empty: kombu's own. Jobs are read under kombu's own and under `:`, which Celery's guide recommends, anyway.
    priority_separator: str = Field(default="", max_length=8)
    #: The priorities that have lists, where producers have set kombu's `priority_steps`: those among these.
    priority_steps: Steps = tuple(range(10))
    #: Producers' `global_keyprefix` of broker_transport_options and of result_backend_transport_options.
    broker_key_prefix: str = Field(default="", max_length=200)
    result_key_prefix: str = Field(default="", max_length=200)

    #: Take jobs with a script that moves them in one step, and have jobs with a countdown wait in Redis. False: kombu's
    #: own way, for brokers that run no scripts; a worker that dies while it takes a job then loses it, and jobs with a
    #: countdown fill its memory.
    atomic_take: bool = True

    #: A hub id, a folder, or `demo`: the checkpoint in worker/demo. `fake` answers without a network, for tests of
    #: what stands around it; `fake:0.05` takes so many seconds a token.
    model: str = "demo"
    #: A commit of the hub's repository: what is loaded then never changes under you.
    model_revision: str | None = None
    #: Load from the hub's cache and never from the network: a worker that needs no way out, and starts where the hub
    #: is away.
    offline: bool = False
    #: `auto` takes the checkpoint's own on a GPU, and float32 on a CPU.
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    #: By bitsandbytes.
    quantization: Literal["none", "4bit", "8bit"] = "none"
    #: `auto`: the first GPU that the process sees, the next ones too where it has no room; else the CPU. As
    #: transformers' `device_map`.
    device_map: str = "auto"

    #: Jobs that the model runs at once.
    max_batch_size: int = Field(default=64, ge=1, le=1024)
    #: Tokens of the batch with its padding, prompts and answers together: what bounds its memory.
    max_batch_tokens: int = Field(default=65_536, ge=1)
    #: Tokens. Longer prompts are refused: cutting them could cut images away.
    max_prompt_tokens: int = Field(default=2048, ge=1)
    #: Tokens. A job that asks for more is refused.
    max_new_tokens: int = Field(default=512, ge=1)
    #: Tokens for a job that does not say.
    default_new_tokens: int = Field(default=64, ge=1)
    #: Images in one job.
    max_images: int = Field(default=32, ge=1)
    #: Bytes of a job's message, pictures in data: URIs included. Each job in the worker holds as much memory.
    max_job_bytes: int = Field(default=32_000_000, ge=1_000)
    #: Jobs in the worker at once; their images load while others compute. 0: three times max_batch_size.
    prefetch: int = Field(default=0, ge=0)
    #: Torch threads of each of the two computing threads (decoder, image encoder); 0: half of the cores. On a CPU only.
    torch_threads: int = Field(default=0, ge=0)

    #: Networks that images may come from although they are not public, as 10.1.0.0/16.
    image_allow_networks: Networks = ()
    #: When set, images come from these hosts and their sub-domains only.
    image_allow_domains: CommaSeparated = ()
    image_ports: Ports = (80, 443)
    #: Bytes. What is beyond 2 MB comes at 15 MB a second for each core, of all downloads together.
    image_max_bytes: int = Field(default=20_000_000, ge=1)
    #: Pixels of one image; phones make 50 million. A JPEG of more than 40 million is decoded at a half of its size or
    #: less, others take up to 16 bytes of memory for each. Above 178 million Pillow refuses too.
    image_max_pixels: int = Field(default=64_000_000, ge=1, le=178_000_000)
    #: Seconds for one image, everything included.
    image_timeout_s: float = Field(default=20.0, gt=0)
    #: Redirects that are followed to an image; each is checked like the first URL.
    image_max_redirects: int = Field(default=5, ge=0, le=20)
    #: A PEM file with the certificates of your own authorities, for images and callbacks from inside your network. The
    #: public authorities stay trusted.
    ca_file: Annotated[FilePath, AfterValidator(_holding_certificates)] | None = None
    #: Downloads at once from one host: a bulk job must not hammer a site, nor a slow one take all threads.
    image_host_turns: int = Field(default=8, ge=1)
    #: Jobs that load images from the network at once, whatever the hosts: those that hang must not take all threads.
    #: 0: a third of those in the worker.
    image_jobs: int = Field(default=0, ge=0)
    #: Seconds, at most, that a job waits before its retry because its image's server asked for it (Retry-After).
    image_retry_after_max_s: float = Field(default=300.0, ge=0)
    #: Your address (a URL, an e-mail), for those whose servers the images come from: it goes into the User-Agent.
    contact: str | None = Field(default=None, max_length=200, pattern=r"^[ -'*-~]+$")
    #: The folder that {"path": ...} images are read from; unset refuses them.
    image_root: Path | None = None

    #: Bytes of decoded images kept in memory: what several jobs show is decoded once.
    image_cache_bytes: int = Field(default=2**28, ge=0)
    #: Bytes of images' features kept on the device: what several jobs show is encoded once.
    feature_cache_bytes: int = Field(default=2**29, ge=0)
    #: Bytes of prompts' shared beginnings (examples, instructions) kept on the device.
    prefix_cache_bytes: int = Field(default=2**29, ge=0)
    #: Record a decode step once for each shape and replay it: on a GPU, to launch a step's kernels one by one takes
    #: longer than they do. Not tried on a GPU yet, so off.
    cuda_graphs: bool = False

    #: `id=whsec_...` pairs: the secrets that sign callbacks. An id given twice signs with both, while a secret rotates.
    callback_keys: Annotated[dict[str, tuple[SecretStr, ...]], NoDecode] = {}
    #: Callbacks to http:// too. Off: what they carry would be readable on the way.
    callback_allow_http: bool = False
    #: Networks that callbacks may go to although they are not public, as 10.1.0.0/16.
    callback_allow_networks: Networks = ()
    #: When set, callbacks go to these hosts and their sub-domains only.
    callback_allow_domains: CommaSeparated = ()
    callback_ports: Ports = (80, 443)
    #: Seconds for one attempt, everything included.
    callback_timeout_s: float = Field(default=15.0, gt=0)
    #: Seconds before each attempt, counted from the one before; their number is that of the attempts. With jitter.
    callback_schedule_s: Seconds = (0, 5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
    #: Attempts at once in one callbacks worker; a quarter of them to one host, so that a slow one holds no other up,
    #: and half of them to hosts that have not answered lately, so that those which hang hold up none that answer.
    callback_concurrency: int = Field(default=16, ge=1, le=1_024)
    #: Seconds that a first attempt waits for others to the same URL, to go out as one `job.batch`. 0: each by itself.
    callback_batch_window_s: float = Field(default=0.0, ge=0)
    #: Events in one `job.batch`; 20 kB are its other bound.
    callback_batch_max: int = Field(default=100, ge=2, le=1_000)
    #: Seconds that a delivery is listed, and can be replayed, after its end.
    callback_keep_s: int = Field(default=86_400, ge=1)
    #: Bytes of pending callbacks to one host, in the queues' Redis. Beyond it the oldest are given up unsent and listed
    #: with the failed ones: a receiver that is away for days must not fill the server.
    callback_max_host_bytes: int = Field(default=2**26, ge=2**16)
    #: Bytes of pending callbacks altogether; the same.
    callback_max_pending_bytes: int = Field(default=2**28, ge=2**16)
    #: Seconds that a URL which answered 410 (Gone) gets no callbacks.
    callback_disabled_s: int = Field(default=604_800, ge=1)

    #: Seconds that a result is kept.
    result_ttl_s: int = Field(default=86_400, ge=1)
    #: Seconds that an idempotency key is remembered, result_ttl_s at most: its answer must outlive it. 0: as long.
    idempotency_ttl_s: int = Field(default=0, ge=0)
    #: Seconds that an answer is reused for identical jobs (same pixels, prompt, sampling and model); jobs that run at
    #: the same time share one row. Greedy or seeded ones only. 0: off, since a hit can tell what others asked.
    answer_cache_ttl_s: int = Field(default=0, ge=0)
    #: Seconds after which a job that does not end is given up, its process replaced and its neighbours run again. A
    #: message may set a lower limit (Celery's time_limit): then its job alone is given up.
    time_limit_s: float = Field(default=600.0, gt=0)
    #: Seconds after which a running job ends with the text it has.
    soft_time_limit_s: float = Field(default=540.0, gt=0)
    #: Seconds that the model may take to load and answer its golden picture.
    load_timeout_s: float = Field(default=1_800.0, gt=0)
    #: Seconds without a sign of life of the engine after which its process is replaced. More than its longest step.
    hang_timeout_s: float = Field(default=300.0, ge=2)
    #: Seconds before a process that died while it loaded is started again; four times as long each time, three times.
    restart_backoff_s: float = Field(default=1.0, ge=0)
    #: Seconds that a worker asked to stop by SIGQUIT waits for its running jobs, before they go back to the queue.
    #: SIGTERM waits until all have ended, but with REMAP_SIGTERM=SIGQUIT is the same.
    soft_shutdown_timeout_s: float = Field(default=60.0, ge=0)
    #: Attempts of a job whose error may pass (unreachable image, lost worker, out of memory).
    max_retries: int = Field(default=3, ge=0)
    #: Seconds before the first retry; it doubles each time, with jitter.
    retry_backoff_s: float = Field(default=2.0, ge=0)
    #: Deliveries of a job, each ended by the death of its whole worker, after which it fails as worker_lost. One among
    #: neighbours may be anybody's fault, and each costs a visibility timeout: the third, which runs alone, decides.
    max_deliveries: int = Field(default=3, ge=2)
    #: Seconds that a running job waits for a Redis that is away or refuses (full, read-only, out of connections) before
    #: it goes back to the queue. Its result, links, retries and callback all wait so. It is no running time.
    redis_wait_s: float = Field(default=300.0, gt=0)
    #: Seconds until the jobs of a worker that died come back. A worker that lives says so every quarter of it, or every
    #: 10 s, for as long as its jobs run: it may be short (60), but longer than your network or Redis may stand still.
    #: With atomic_take=false nobody says so: then it must be more than any job lasts.
    visibility_timeout_s: int = Field(default=3_600, ge=1)

    #: Failed jobs kept with their payload, to be looked at and sent again (`idefics-jobs failed`).
    failed_max: int = Field(default=10_000, ge=0)
    #: Bytes of all of them: they lie in the results' Redis, and pictures sent as data: URIs are large.
    failed_max_bytes: int = Field(default=2**28, ge=0)
    #: Seconds that one is kept: two weeks.
    failed_ttl_s: int = Field(default=1_209_600, ge=1)

    #: The file with the worker's state, one for each worker; `python -m worker.health` reads this name too. Unset: a
    #: file under the temporary directory, where the probe finds it.
    state_file: Path | None = None

    #: Of the workers' logs; `--loglevel` of Celery's command goes before.
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"

    @model_validator(mode="before")
    @classmethod
    def _results_lie_beside_the_queues(cls, values: dict[str, Any]) -> dict[str, Any]:
        broker = values.get("broker_url") or DEFAULT_BROKER
        url = broker.get_secret_value() if isinstance(broker, SecretStr) else str(broker)
        try:
            return {"result_backend": results_beside(url), **values}
        except ValueError:
            # `_servers_are_known` says so, after what is wrong with the broker's own URL.
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
        pairs = [item.partition("=") for item in _split(value)]
        if any(not name or not _is_secret(secret) for name, _, secret in pairs):
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
    def image_job_turns(self) -> int:
        """Jobs that load images from the network at once."""
        return self.image_jobs or max(1, self.job_threads // 3)


#: What Kubernetes puts into each pod for a Service of its namespace, and docker for `--link`: by the ends of the names,
#: and what their values are. A Service called `idefics-redis` has names that begin like ours.
_INJECTED = tuple(
    (re.compile(name + r"\Z"), re.compile(value))
    for name, value in (
        (r"_SERVICE_HOST", r"[\w.:-]*"),
        (r"_SERVICE_PORT(_[A-Z0-9_]+)?", r"\d*"),
        (r"_PORT", r"(tcp|udp|sctp)://\S+"),
        (r"_PORT_\d+_(TCP|UDP|SCTP)", r"(tcp|udp|sctp)://\S+"),
        (r"_PORT_\d+_(TCP|UDP|SCTP)_PROTO", r"tcp|udp|sctp"),
        (r"_PORT_\d+_(TCP|UDP|SCTP)_PORT", r"\d+"),
        (r"_PORT_\d+_(TCP|UDP|SCTP)_ADDR", r"[\w.:-]+"),
        # Of docker's links: the name, and the other container's environment.
        (r"_NAME", r"/\S+"),
        (r"_ENV_\w+", r"(?s:.*)"),
    )
)


def _is_injected(name: str, value: str) -> bool:
    """Whether a variable is an orchestrator's, about a service whose name begins like our settings."""
    rest = name[len(PREFIX) - 1 :]
    return any(ending.search(rest) and form.fullmatch(value) for ending, form in _INJECTED)


def load() -> Settings:
    """The settings of this environment. Raises ValueError for an unknown `IDEFICS_` name."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    others = {name: value for name, value in os.environ.items() if name.startswith(PREFIX) and name not in known}
    unknown = sorted(name for name, value in others.items() if not _is_injected(name, value))
    if unknown:
        raise ValueError(f"Unknown settings: {', '.join(unknown)}. `python -m config` lists all.")
    return Settings()
