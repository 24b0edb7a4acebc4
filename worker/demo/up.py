"""`make up`: a broker and a worker with the bundled model, until Ctrl-C. For a first hour with the project.

If a Redis server answers on the port already, the worker uses it, unless a worker of this machine already takes jobs
there: then `make up` ends and says so. If there are secrets for callbacks, a callbacks worker runs too. Both have the
settings of this environment.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from celery.utils.nodenames import default_nodename
from redis import RedisError

from config.settings import DEFAULT_BROKER, PREFIX, Settings, load
from tasks import Callback, Client, IdeficsError
from tasks.errors import from_broker
from tasks.protocol import QUEUE
from tasks.redis_urls import results_beside
from worker.delivery.callback_policy import check
from worker.demo import stack

PICTURES = stack.CHECKOUT / "examples" / "pictures"
PORT = 6379
#: Names of this machine, where `make up` can start a broker.
HERE = ("localhost", "127.0.0.1")
#: Seconds for a Redis to answer.
ANSWER_S = 3.0
#: The id of a secret that `make up` makes.
KEY_ID = "main"
#: Matches a line of a worker's log at WARNING or above.
LOUD = re.compile(r"^\S+ \S+ (WARNING|ERROR|CRITICAL) ")

READY = """\
Ready: queues in {queues}, results in {results}, {model}. Ctrl-C ends {what}.
In another shell:

  . .venv/bin/activate
  idefics-jobs {options}submit caption image=@examples/pictures/cat.png --wait
{callbacks}
Logs: {folder}
"""
CALLBACKS = """
Callbacks go to {url} only. The receiver's secret:

  {secret}

A job asks for one with callback=Callback(url="{url}", key_id="{key_id}");
submit it by a Client(..., check_callbacks=False).
"""
PUBLIC_CALLBACKS = """
Callbacks go to public addresses over https only. To try them here: make up CALLBACKS=http://localhost:8000/hook
"""


# --- Options, settings and messages ---------------------------------------------------------------


def broker_url(port: int | None, named: str) -> str:
    """The broker's URL, by PORT and IDEFICS_BROKER_URL. Raises StartFailed if these contradict each other."""
    if not named:
        return f"redis://localhost:{port or PORT}/0"
    if port is not None and port != _port_here(named):
        raise stack.StartFailed(f"PORT={port} and IDEFICS_BROKER_URL name different brokers: leave one of them out.")
    return named


def _port_here(url: str) -> int | None:
    """The port of a Redis server on this machine; None for another machine or a socket."""
    try:
        parts = urlsplit(url)
        return (parts.port or PORT) if parts.hostname in HERE else None
    except ValueError:
        # Loading the settings reports the error.
        return None


def startable_port(url: str) -> int | None:
    """The port on which `make up` can start a broker for a URL; None if the URL needs users, TLS or another machine."""
    return _port_here(url) if url.startswith("redis://") and "@" not in url else None


def callback_settings(url: str, keys: str) -> dict[str, str]:
    """Settings that allow callbacks to one receiver, at any address, and to no other; with a new secret if there are no
    keys. Raises StartFailed.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        addresses = {str(target[0]).partition("%")[0] for *_, target in socket.getaddrinfo(parts.hostname, port)}
    except (ValueError, KeyError):
        raise stack.StartFailed("CALLBACKS is not a receiver's URL: write it as http://localhost:8000/hook.") from None
    except OSError:
        raise stack.StartFailed(f"CALLBACKS: {parts.hostname} has no address: correct its name.") from None
    return {
        "CALLBACK_KEYS": keys or f"{KEY_ID}=whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}",
        "CALLBACK_ALLOW_HTTP": str(parts.scheme == "http"),
        "CALLBACK_ALLOW_DOMAINS": str(parts.hostname),
        "CALLBACK_ALLOW_NETWORKS": ",".join(sorted(addresses)),
        "CALLBACK_PORTS": str(port),
    }


def ready(settings: Settings, receiver: str, *, has_started_broker: bool, has_made_secret: bool, folder: Path) -> str:
    """The message when all is running: what to do next."""
    url, results = settings.broker_url.get_secret_value(), settings.result_backend.get_secret_value()
    queues, answers = _shown("BROKER_URL", url), _shown("RESULT_BACKEND", results)
    is_default, is_beside = url == DEFAULT_BROKER, _are_beside(url, results)
    return READY.format(
        queues=queues,
        results=answers,
        model="the bundled model" if settings.model == "demo" else settings.model,
        what="all" if has_started_broker else "what it started, and leaves the Redis that was there",
        callbacks=_told_of_callbacks(settings, receiver, has_made_secret),
        options=f"{'' if is_default else f'--broker {queues} '}{'' if is_beside else f'--results {answers} '}",
        folder=folder,
    )


def _shown(name: str, url: str) -> str:
    """A URL as a shell's word; its setting's name instead if it may contain a password."""
    return f'"${PREFIX}{name}"' if "@" in url or "password" in url else shlex.quote(url)


def _are_beside(url: str, results: str) -> bool:
    try:
        return results_beside(url) == results
    except ValueError:
        return False


def _told_of_callbacks(settings: Settings, receiver: str, has_made_secret: bool) -> str:
    if not settings.callback_keys:
        return ""
    key_id, (secret, *_) = next(iter(settings.callback_keys.items()))
    if receiver:
        shown = secret.get_secret_value() if has_made_secret else f"{key_id}'s in IDEFICS_CALLBACK_KEYS"
        return CALLBACKS.format(url=receiver, key_id=key_id, secret=shown)
    # If networks are allowed, callbacks to receivers in them already work.
    return "" if settings.callback_allow_networks else PUBLIC_CALLBACKS


# --- Start and supervision ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """The URLs of queues and results."""

    url: str
    results: str


@contextlib.contextmanager
def broker_at(url: str) -> Iterator[stack.Broker | None]:
    """Starts a broker for a URL; None if one answers there already."""
    port = startable_port(url)
    if port is None or _is_listening(port):
        yield None
        return
    with stack.broker(port=port) as broker:
        print(f"Started a broker on port {port}.", flush=True)
        yield broker


def _is_listening(port: int) -> bool:
    try:
        socket.create_connection(("localhost", port), ANSWER_S).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        # Something listens there; `check_answers` checks what it answers.
        return True
    return True


def own_node_name() -> str:
    """The name that Celery gives to a worker of this machine that is started without one."""
    return str(default_nodename(None))


def check_workers(names: Sequence[str], queue: str) -> str:
    """A line about the workers that already take from a queue; empty if there are none.

    Raises StartFailed if one of them has the name that ours would have: Celery needs a name for each.
    """
    ours = own_node_name()
    if ours in names:
        raise stack.StartFailed(
            f"A worker of this machine, {ours}, already takes jobs from the queue {queue!r} of this Redis: another "
            "`make up`, or a worker that you started. Use that one, or start a broker and a worker on a free port: "
            "make up PORT=7101. (A worker that was killed is listed for 15 s more.)"
        )
    return f"Jobs are shared with the workers that already run: {', '.join(names)}." if names else ""


def check_answers(place: Place, queue: str = QUEUE) -> list[str]:
    """The names of the workers that take from a queue. Raises StartFailed, with the cure, if the Redis server of the
    queues or of the results cannot be used."""
    try:
        client = Client(place.url, result_backend=place.results, queue=queue)
        options = {"socket_timeout": ANSWER_S, "socket_connect_timeout": ANSWER_S}
        client.app.conf.broker_transport_options = {**client.app.conf.broker_transport_options, **options}
        client.app.conf.redis_socket_timeout = ANSWER_S
        client.ping()
        client.app.backend.client.ping()
        return client.workers()
    except (IdeficsError, RedisError) as error:
        raise stack.StartFailed(
            f"{from_broker(error)} Correct IDEFICS_BROKER_URL or IDEFICS_RESULT_BACKEND, with a password where it asks "
            "for one; or take a free port, where a broker is started, as `make up PORT=7101`."
        ) from None


def chosen(port: int | None, receiver: str) -> Settings:
    """The workers' settings: this environment's, completed by the command line's. Raises ValueError or StartFailed."""
    # Variables of the user's own site, which would override all URLs.
    for name in [name for name in os.environ if name.startswith(("CELERY_BROKER_", "CELERY_RESULT_BACKEND"))]:
        del os.environ[name]
    os.environ["IDEFICS_BROKER_URL"] = broker_url(port, os.environ.get("IDEFICS_BROKER_URL", ""))
    os.environ["IDEFICS_IMAGE_ROOT"] = os.environ.get("IDEFICS_IMAGE_ROOT") or str(PICTURES)
    if receiver:
        keys = os.environ.get("IDEFICS_CALLBACK_KEYS", "")
        os.environ |= {f"{PREFIX}{name}": value for name, value in callback_settings(receiver, keys).items()}
    settings = load()
    if receiver:
        check(Callback(url=receiver, key_id=next(iter(settings.callback_keys))), settings)
    return settings


def start(settings: Settings, folder: Path, started: contextlib.ExitStack) -> dict[str, subprocess.Popen[bytes]]:
    """Start the broker, if needed, and the workers. Returns the processes by name."""
    place = Place(settings.broker_url.get_secret_value(), settings.result_backend.get_secret_value())
    broker = started.enter_context(broker_at(place.url))
    others = check_answers(place, settings.queue)
    if broker is None:
        port = _port_here(place.url)
        print(f"Using the Redis that answers {f'on port {port}' if port else 'at IDEFICS_BROKER_URL'}.", flush=True)
    if shared := check_workers(others, settings.queue):
        print(shared, flush=True)
    passed = {name.removeprefix(PREFIX): value for name, value in os.environ.items() if name.startswith(PREFIX)}
    apps = {"worker": "worker.app"}
    if settings.callback_keys:
        apps["callbacks"] = "worker.callbacks"
    print(f"Starting a worker{' and a callbacks worker' if 'callbacks' in apps else ''} ...", flush=True)
    running = {"broker": broker.process} if broker else {}
    for name, app in apps.items():
        log = folder / f"{name}.log"
        log.touch()
        started.enter_context(_repeated(log))
        arguments = () if name == "worker" else ("--hostname", f"{name}@%h")
        running[name] = started.enter_context(
            stack.worker(place, *arguments, settings=passed, log=log, app=app, start_s=settings.load_timeout_s)
        )
    return running


@contextlib.contextmanager
def _repeated(log: Path) -> Iterator[None]:
    """During the block, show the lines of a worker's log at WARNING or above."""
    is_over = threading.Event()
    thread = threading.Thread(target=_repeat, args=[log, is_over], daemon=True, name=f"repeat-{log.name}")
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _repeat(log: Path, is_over: threading.Event) -> None:
    with log.open(errors="replace") as file:
        while not is_over.wait(0.2):
            sys.stderr.writelines(line for line in file if LOUD.match(line))
            sys.stderr.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, help=f"of the broker; without IDEFICS_BROKER_URL {PORT}")
    parser.add_argument("--callbacks", metavar="URL", default="", help="a receiver that callbacks may go to")
    options = parser.parse_args()
    has_keys = bool(os.environ.get("IDEFICS_CALLBACK_KEYS"))
    with tempfile.TemporaryDirectory(prefix="idefics-up-") as path, contextlib.ExitStack() as started:
        try:
            settings = chosen(options.port, options.callbacks)
            running = start(settings, Path(path), started)
            text = ready(
                settings,
                options.callbacks,
                has_started_broker="broker" in running,
                has_made_secret=not has_keys,
                folder=Path(path),
            )
            print(text, end="", flush=True)
            _wait(running, Path(path))
        except KeyboardInterrupt:
            print("\nStopping ...", flush=True)
            return 0
        except (stack.StartFailed, IdeficsError, ValueError) as error:
            print(error, file=sys.stderr)
            return 1


def _wait(running: Mapping[str, subprocess.Popen[bytes]], folder: Path) -> NoReturn:
    """Wait for ever. Raises StartFailed when one of the processes has ended by itself."""
    while True:
        for name, process in running.items():
            if process.poll() is not None:
                log = folder / f"{name}.log"
                said = f":\n{log.read_text(errors='replace')[-4000:]}" if log.exists() else "."
                raise stack.StartFailed(f"Ended: {name}{said}")
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
