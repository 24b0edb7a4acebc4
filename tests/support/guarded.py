"""Redis as it is shipped: with its users, by the ACL file and the certificates that config/redis/secrets.sh makes."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from worker.demo import stack

USERS = ("producer", "worker", "callbacks", "monitor", "exporter")
SCRIPT = stack.CHECKOUT / "config" / "redis" / "secrets.sh"
#: Where containers mount their folder of the secrets.
MOUNT = "/run/idefics"


def make_secrets(folder: Path, *hosts: str, models: str | None = None) -> Path:
    """`models`: MODELS; None where it is not set."""
    environment = {**os.environ, **({} if models is None else {"MODELS": models})}
    subprocess.run(["sh", str(SCRIPT), str(folder), *hosts], env=environment, check=True, timeout=60)
    return folder


def password(secrets: Path, user: str) -> str:
    return (secrets / user / "password").read_text().strip()


def as_user(server: stack.Broker, secrets: Path, user: str) -> stack.Broker:
    return replace(server, credentials=f"{user}:{password(secrets, user)}@")


def environment(secrets: Path, user: str) -> dict[str, str]:
    """A user's `env` file, with its certificates where they are on this machine."""
    lines = (secrets / user / "env").read_text().replace(MOUNT, str(secrets / user)).splitlines()
    return dict(line.split("=", 1) for line in lines)


def binaries() -> list[str]:
    """Every server of this machine: the embedded one, and those that are installed."""
    found = [shutil.which(name) for name in ("redis-server", "valkey-server")]
    return [stack.embedded_binary(), *filter(None, found)]


def has_tls(binary: str) -> bool:
    run = subprocess.run([binary, "--port", "0", "--tls-port", "1"], capture_output=True, text=True, timeout=20)
    return "Failed to configure TLS" in run.stdout


async def _ended(tasks: Iterable[asyncio.Task[Any]]) -> None:
    # gather wants a running loop.
    await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def tls_proxy(target: int, secrets: Path) -> Iterator[int]:
    """A port that asks for a client's certificate and passes on what comes to a port without TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(secrets / "redis" / "tls.crt", secrets / "redis" / "tls.key")
    context.load_verify_locations(secrets / "redis" / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    loop = asyncio.new_event_loop()
    listener = socket.create_server(("127.0.0.1", 0))
    server = loop.run_until_complete(asyncio.start_server(serve, sock=listener, ssl=context))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for task in (tasks := asyncio.all_tasks(loop)):
            task.cancel()
        loop.run_until_complete(_ended(tasks))
        loop.close()
