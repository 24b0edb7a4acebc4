"""Redis URLs, as the worker and the client both read them: which are accepted, and the options that Celery gets.

No message here repeats a URL: it may hold a password.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlsplit, urlunsplit

SCHEMES = ("redis", "rediss", "redis+socket", "socket", "sentinel")

#: Seconds without an answer after which the next sentinel is asked.
SENTINEL_TIMEOUT_S = 5.0
#: Parameters that a sentinel:// URL's query may have.
_SENTINEL_QUERY = ("master_name", "sentinel_username", "sentinel_password")

NOT_CERTAIN = (
    "where results go follows from the broker's URL only for one redis:// or rediss:// address whose path is the "
    "number of a database"
)


@dataclass(frozen=True, slots=True)
class Server:
    """A Redis server's URL and options for Celery."""

    url: str
    #: Transport options that Celery needs beside the URL: the same for its broker and its result backend.
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_socket(self) -> bool:
        return self.url.startswith("redis+socket:")

    @property
    def keepalive(self) -> dict[str, bool]:
        """The option that keeps idle TCP connections open; a Unix socket's connection refuses it."""
        return {} if self.is_socket else {"socket_keepalive": True}


def server(url: str, master: str = "", sentinel_password: str = "") -> Server:
    """The URL and options for Celery. `master` and `sentinel_password` are for a sentinel:// URL without them.

    Raises ValueError with the cure for a URL that Celery would misread.
    """
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES or "://" not in url:
        raise ValueError("a Redis URL, as redis://localhost:6379/0, rediss://, redis+socket:///path or sentinel://")
    if scheme == "sentinel":
        return _sentinel(url, master, sentinel_password)
    query = dict(parse_qsl(_split(url).query, keep_blank_values=True))
    if "db" in query:
        raise ValueError(
            "?db= is read for results and ignored for queues: write the database as redis://host/1, "
            "or redis+socket:///path?virtual_host=1"
        )
    if scheme in ("redis+socket", "socket"):
        # Kombu reads the first name, Celery's result backends read both.
        return Server(f"redis+socket://{url.partition('://')[2]}")
    if scheme == "redis" and any(name.startswith("ssl_") for name in query):
        raise ValueError("ssl_ options need rediss://: redis:// would speak without TLS")
    # Celery's defaults differ between broker and results, and between versions.
    if scheme == "rediss" and "ssl_cert_reqs" not in query:
        raise ValueError(
            "rediss:// needs ?ssl_cert_reqs=required&ssl_ca_certs=/ca.crt, and &ssl_certfile=/tls.crt"
            "&ssl_keyfile=/tls.key where the server asks for a client's certificate"
        )
    return Server(url)


def result_server(url: str, master: str = "", sentinel_password: str = "") -> Server:
    """`server`, for results. Raises ValueError for a list of servers too, which Celery reads for queues only."""
    found = server(url, master, sentinel_password)
    if ";" in found.url and not found.options:
        raise ValueError("results have one server; of several, Sentinel names the one that counts (sentinel://)")
    return found


def results_beside(broker: str) -> str:
    """The Redis URL with the next database: `redis://host/0` gives `redis://host/1`. Raises ValueError elsewhere."""
    parts = _split(broker)
    number = parts.path.strip("/") or "0"
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    is_number = number.isascii() and number.isdecimal() and parts.path.count("/") <= 1
    if parts.scheme not in ("redis", "rediss") or not is_number or ";" in broker or parts.fragment:
        raise ValueError(NOT_CERTAIN)
    if query.keys() & {"db", "virtual_host"}:
        raise ValueError(NOT_CERTAIN)
    return urlunsplit(parts._replace(path=f"/{int(number) + 1}"))


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        # `port` is parsed when it is read: an unescaped `/` or `#` in a password ends up in it.
        _ = parts.port
    except ValueError:
        raise ValueError(
            "the URL cannot be read: percent-encode what is special in its password (/ as %2F, # as %23, @ as %40)"
        ) from None
    return parts


def _sentinel(url: str, master: str, sentinel_password: str) -> Server:
    """A list of sentinels. All must have the same database and password: Celery reads them from any one."""
    parts = [_split(chunk) for chunk in url.split(";") if chunk]
    if any(part.scheme != "sentinel" or not part.hostname for part in parts):
        raise ValueError("sentinels are written sentinel://host:26379;sentinel://host2:26379/0, each with sentinel://")
    query = dict(pair for part in parts for pair in parse_qsl(part.query, keep_blank_values=True))
    unknown = sorted(query.keys() - set(_SENTINEL_QUERY))
    if unknown:
        raise ValueError(f"a sentinel:// URL takes {', '.join(_SENTINEL_QUERY)}, and no {', '.join(unknown)}")
    master = query.get("master_name") or master
    if not master:
        raise ValueError("sentinel:// needs the master's name: ?master_name=mymaster, or IDEFICS_SENTINEL_MASTER")
    database = _one({part.path.strip("/") for part in parts} - {""}, "database") or "0"
    if not (database.isascii() and database.isdecimal()):
        raise ValueError("a sentinel:// URL's path is the number of a database")
    credentials = _one({part.netloc.rpartition("@")[0] for part in parts} - {""}, "password")
    at = f"{credentials}@" if credentials else ""
    addresses = [f"sentinel://{at}{part.netloc.rpartition('@')[2]}/{database}" for part in parts]
    return Server(
        ";".join(addresses), {"master_name": master, "sentinel_kwargs": _to_sentinel(query, sentinel_password)}
    )


def _one(values: set[str], what: str) -> str:
    if len(values) > 1:
        raise ValueError(f"the sentinels of one URL lead to one server: give them one {what}")
    return next(iter(values), "")


def _to_sentinel(query: dict[str, str], password: str) -> dict[str, Any]:
    """Options for the connections to the sentinels. By default Celery waits without a timeout for a silent sentinel."""
    credentials = {
        "username": query.get("sentinel_username", ""),
        "password": query.get("sentinel_password") or password,
    }
    timeouts = {"socket_timeout": SENTINEL_TIMEOUT_S, "socket_connect_timeout": SENTINEL_TIMEOUT_S}
    return {**timeouts, **{name: value for name, value in credentials.items() if value}}
