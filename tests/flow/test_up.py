"""`make up`: one command leaves a broker and a worker running, and Ctrl-C ends what it started."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil
import pytest

from tasks import Callback, Caption, Client, Complete, ImagePath
from tests.conftest import SITE_SECRET, callback_settings
from tests.support.receiver import Receiver
from tests.support.waiting import PATIENCE_S, SOON_S, eventually
from worker.demo import stack


def started(arguments: tuple[str, ...], settings: Mapping[str, str], errors: IO[str]) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("IDEFICS_")}
    # Of a shell whose site has a broker of its own.
    environment |= {"CELERY_BROKER_URL": "redis://site.invalid/0"}
    environment |= {f"IDEFICS_{name}": value for name, value in settings.items()}
    command = [sys.executable, "-m", "worker.demo.up", *arguments]
    return subprocess.Popen(
        command,
        cwd=stack.CHECKOUT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        # Where the tests run in the background, Ctrl-C is ignored, and a child would ignore it too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@dataclass
class Up:
    process: subprocess.Popen[str]
    errors: Path
    #: What it has printed.
    lines: list[str] = field(default_factory=list)

    @property
    def told(self) -> str:
        return "".join(self.lines)

    def interrupted(self) -> int:
        """Its exit status after Ctrl-C, with nothing of it left."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(PATIENCE_S)
        _, alive = psutil.wait_procs(children, timeout=SOON_S)
        assert alive == []
        return status


@contextmanager
def up(*arguments: str, **settings: str) -> Iterator[Up]:
    """With what it has printed until it is ready."""
    with tempfile.NamedTemporaryFile("w+") as errors:
        process = started(arguments, settings, errors.file)
        found = Up(process, Path(errors.name))
        try:
            assert process.stdout is not None
            for line in process.stdout:
                found.lines.append(line)
                if line.startswith("Logs"):
                    break
            else:
                pytest.fail(found.told + found.errors.read_text())
            yield found
        finally:
            process.kill()
            process.wait(PATIENCE_S)


def refused(*arguments: str, **settings: str) -> str:
    """What it says where it ends by itself, within seconds."""
    begun = time.monotonic()
    with tempfile.NamedTemporaryFile("w+") as errors:
        process = started(arguments, settings, errors.file)
        assert process.wait(PATIENCE_S) == 1
        assert time.monotonic() - begun < 20
        return Path(errors.name).read_text()


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_broker_and_a_worker_run_until_ctrl_c() -> None:
    port = stack.free_port()
    with up("--port", str(port)) as running:
        assert running.told.startswith(f"Started a broker on port {port}.\n")
        job = Client(f"redis://localhost:{port}/0").submit(Caption(image=ImagePath(path="cat.png")))
        assert job.result(timeout=120).text.strip() == "A cat on a blue background."
        assert running.interrupted() == 0
    assert not is_listening(port)


def test_a_redis_that_is_there_is_used_and_left() -> None:
    with stack.broker() as server:
        with up("--port", str(server.port), MODEL="fake") as running:
            assert running.told.startswith(f"Using the Redis that answers on port {server.port}.\n")
            job = Client(server.url).submit(Complete(prompt=["Hello"], max_new_tokens=3))
            assert job.result(PATIENCE_S).text == "llo"
            assert running.interrupted() == 0
        assert server.connect().ping()


def test_a_second_one_beside_the_first_is_refused_with_the_cure() -> None:
    port = str(stack.free_port())
    with up("--port", port, MODEL="fake"):
        said = refused("--port", port, MODEL="fake")
        assert re.search(r"already takes jobs from the queue 'idefics' .*make up PORT=7101", said)
        client = Client(f"redis://localhost:{port}/0")
        assert client.submit(Complete(prompt=["Hello"], max_new_tokens=3)).result(PATIENCE_S).text == "llo"


def test_settings_of_the_environment_are_the_workers_and_what_goes_wrong_later_is_shown() -> None:
    with stack.broker("--requirepass", "secret") as server:
        url = f"redis://:secret@localhost:{server.port}/4"
        with up(BROKER_URL=url, MODEL="fake", MAX_NEW_TOKENS="7") as running:
            assert "secret" not in running.told
            client = Client(url)
            assert client.submit(Complete(prompt=["Hello"], max_new_tokens=3)).result(PATIENCE_S).model.id == "fake"
            with pytest.raises(Exception, match="max_new_tokens"):
                client.submit(Complete(prompt=["Hello"], max_new_tokens=8)).result(PATIENCE_S)
            server.process.kill()
            eventually(lambda: "WARNING" in running.errors.read_text() or "ERROR" in running.errors.read_text())


def test_a_variable_that_names_a_broker_on_this_machine_starts_one() -> None:
    port = stack.free_port()
    with up(BROKER_URL=f"redis://127.0.0.1:{port}/2", MODEL="fake") as running:
        assert running.told.startswith(f"Started a broker on port {port}.\n")
        assert f"--broker redis://127.0.0.1:{port}/2 " in running.told
        job = Client(f"redis://localhost:{port}/2").submit(Complete(prompt=["Hello"], max_new_tokens=3))
        assert job.result(PATIENCE_S).text == "llo"


@pytest.mark.parametrize(
    ("arguments", "settings", "says"),
    [
        ((), {"BROKER_URL": "redis://redis.invalid/0"}, "does not answer.*IDEFICS_BROKER_URL.*make up PORT="),
        (("--port", "7101"), {"BROKER_URL": "redis://localhost:7102/0"}, "PORT=7101 and IDEFICS_BROKER_URL"),
        ((), {"BROKER_URL": "http://localhost"}, "a Redis URL"),
        ((), {"BROKR_URL": "redis://localhost"}, "Unknown settings: IDEFICS_BROKR_URL"),
        (("--callbacks", "http://user@localhost/hook"), {}, "without a user"),
    ],
)
def test_what_cannot_be_started_is_told_at_once(
    arguments: tuple[str, ...], settings: dict[str, str], says: str
) -> None:
    assert re.search(says, refused(*arguments, **settings))


def test_a_redis_that_asks_for_a_password_is_named_with_the_cure() -> None:
    with stack.broker("--requirepass", "secret") as server:
        assert re.search(r"Authentication.*with a password", refused("--port", str(server.port)))


def test_a_results_redis_that_is_away_is_told_at_once() -> None:
    away = stack.free_port()
    said = refused("--port", str(stack.free_port()), RESULT_BACKEND=f"redis://localhost:{away}/1")
    assert f"localhost:{away}" in said


# Callbacks


def called_back(receiver: Receiver, broker: str, key_id: str, secret: str) -> None:
    """Assert that a job's callback comes, by another name of the receiver's host too."""
    callback = Callback(url=receiver.url.replace("127.0.0.1", "localhost"), key_id=key_id)
    job = Client(broker, check_callbacks=False).submit(Complete(prompt=["Hello"], max_new_tokens=3, callback=callback))
    assert job.result(PATIENCE_S).text == "llo"
    eventually(lambda: receiver.calls)
    assert receiver.calls[0].verified(secret)["data"]["id"] == job.id


def test_callbacks_go_to_the_receiver_that_is_named_with_a_secret_of_their_own() -> None:
    port = stack.free_port()
    with Receiver().open() as receiver:
        url = f"http://localhost:{receiver.port}/hook"
        with up("--port", str(port), "--callbacks", url, MODEL="fake") as running:
            [secret] = re.findall(r"^ +(whsec_\S+)$", running.told, re.MULTILINE)
            called_back(receiver, f"redis://localhost:{port}/0", "main", secret)
            assert running.interrupted() == 0


def test_a_secret_of_the_environment_starts_the_callbacks_worker_too() -> None:
    port = stack.free_port()
    with (
        Receiver().open() as receiver,
        up("--port", str(port), MODEL="fake", **callback_settings(receiver.port)) as running,
    ):
        assert "a callbacks worker" in running.told
        called_back(receiver, f"redis://localhost:{port}/0", "main", SITE_SECRET)
