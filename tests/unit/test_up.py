"""What `make up` makes of its options and of the environment, and `make help`."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from pydantic import SecretStr

from config.settings import Settings
from worker.demo import stack
from worker.demo.up import broker_url, callback_settings, check_workers, own_node_name, ready, startable_port

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@pytest.mark.parametrize(
    ("port", "named", "url"),
    [
        (None, "", "redis://localhost:6379/0"),
        (7101, "", "redis://localhost:7101/0"),
        (None, "redis://a.example/3", "redis://a.example/3"),
        (7101, "redis://127.0.0.1:7101/3", "redis://127.0.0.1:7101/3"),
        (6379, "redis://localhost", "redis://localhost"),
        (7101, "redis://:secret@localhost:7101/0", "redis://:secret@localhost:7101/0"),
    ],
)
def test_the_queues_are_where_the_port_or_the_variable_says(port: int | None, named: str, url: str) -> None:
    assert broker_url(port, named) == url


@pytest.mark.parametrize("named", ["redis://localhost:7102/0", "redis://localhost", "redis://a.example:7101/0"])
def test_a_port_and_a_variable_that_disagree_are_refused(named: str) -> None:
    with pytest.raises(stack.StartFailed, match="PORT=7101 and IDEFICS_BROKER_URL"):
        broker_url(7101, named)


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("redis://localhost:7101/3", 7101),
        ("redis://127.0.0.1", 6379),
        ("redis://:secret@localhost/0", None),
        ("rediss://localhost/0?ssl_cert_reqs=required", None),
        ("redis://a.example/0", None),
        ("redis+socket:///run/redis.sock", None),
        ("sentinel://localhost:26379", None),
    ],
)
def test_a_broker_is_started_where_its_url_would_find_it(url: str, port: int | None) -> None:
    assert startable_port(url) == port


def test_a_worker_of_this_machine_is_not_joined() -> None:
    with pytest.raises(stack.StartFailed, match=r"'idefics' of this Redis: another `make up`.*make up PORT=7101"):
        check_workers(["gpu0@far", own_node_name()], "idefics")


def test_workers_elsewhere_are_named_and_joined() -> None:
    assert (
        check_workers(["gpu0@far", "gpu1@far"], "idefics")
        == "Jobs are shared with the workers that already run: gpu0@far, gpu1@far."
    )
    assert check_workers([], "idefics") == ""


def test_a_receiver_is_all_that_callbacks_may_go_to() -> None:
    settings = callback_settings("http://127.0.0.1:8000/hook", "")
    assert re.fullmatch(r"main=whsec_[A-Za-z0-9+/]{43}=", settings.pop("CALLBACK_KEYS"))
    assert settings == {
        "CALLBACK_ALLOW_HTTP": "True",
        "CALLBACK_ALLOW_DOMAINS": "127.0.0.1",
        "CALLBACK_ALLOW_NETWORKS": "127.0.0.1",
        "CALLBACK_PORTS": "8000",
    }
    assert callback_settings("https://127.0.0.1/hook", f"site={SECRET}") == {
        **settings,
        "CALLBACK_KEYS": f"site={SECRET}",
        "CALLBACK_ALLOW_HTTP": "False",
        "CALLBACK_PORTS": "443",
    }


@pytest.mark.parametrize("url", ["localhost:8000/hook", "ftp://localhost/", "http://localhost:x/", "http://a.invalid/"])
def test_what_cannot_be_a_receiver_is_refused(url: str) -> None:
    with pytest.raises(stack.StartFailed, match="CALLBACKS"):
        callback_settings(url, "")


def told(url: str, receiver: str = "", *, has_made_secret: bool = False, **options: str) -> str:
    settings = Settings(broker_url=SecretStr(url), **options)
    return ready(
        settings, receiver, has_started_broker=True, has_made_secret=has_made_secret, folder=Path("/tmp/idefics-up")
    )


def test_the_command_line_is_told_of_a_broker_that_is_not_its_default() -> None:
    assert "idefics-jobs submit caption" in told("redis://localhost:6379/0")
    assert "idefics-jobs --broker redis://localhost:7101/0 submit caption" in told("redis://localhost:7101/0")
    elsewhere = told("redis://localhost:6379/0", result_backend="redis://localhost:6379/5")
    assert "idefics-jobs --results redis://localhost:6379/5 submit" in elsewhere


def test_a_password_is_not_shown() -> None:
    text = told("redis://:secret@localhost:7101/0")
    assert "secret" not in text
    assert '--broker "$IDEFICS_BROKER_URL" submit' in text


def test_a_secret_is_shown_where_it_was_made_and_its_place_where_it_was_given() -> None:
    url, keys = "http://localhost:8000/hook", {"callback_keys": f"site={SECRET}"}
    assert SECRET in told("redis://localhost", url, has_made_secret=True, **keys)
    given = told("redis://localhost", url, **keys)
    assert SECRET not in given
    assert "site's in IDEFICS_CALLBACK_KEYS" in given
    for text in (given, told("redis://localhost", url, has_made_secret=True, **keys)):
        assert f'Callback(url="{url}", key_id="site")' in text


def test_without_a_receiver_it_is_said_how_callbacks_come_to_this_machine() -> None:
    hint = "make up CALLBACKS=http://localhost:8000/hook"
    keys = {"callback_keys": f"site={SECRET}"}
    assert hint in told("redis://localhost", **keys)
    assert hint not in told("redis://localhost", **keys, callback_allow_networks="127.0.0.0/8")
    assert "allback" not in told("redis://localhost")


def make(*arguments: str) -> str:
    command = ["make", *arguments]
    # Not as a part of the `make test` that may run this.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    return subprocess.run(
        command, cwd=stack.CHECKOUT, env=environment, capture_output=True, text=True, check=True, timeout=30
    ).stdout


def test_make_lists_every_target_with_a_line() -> None:
    [phony] = re.findall(r"^\.PHONY: (.*)$", (stack.CHECKOUT / "Makefile").read_text(), re.MULTILINE)
    targets = re.findall(r"^(\w+):", (stack.CHECKOUT / "Makefile").read_text(), re.MULTILINE)
    assert set(phony.split()) == set(targets)
    listed = re.findall(r"^make (\w+) +\S.*$", make(), re.MULTILINE)
    assert listed == targets


def test_an_installation_says_that_it_takes_minutes() -> None:
    first, *_ = make("--dry-run", "up", "VENV=/nowhere/venv").splitlines()
    assert "Installing into /nowhere/venv" in first
    assert "minutes" in first


def test_make_hands_its_variables_over() -> None:
    *_, last = make("--dry-run", "up", "PORT=7101", "CALLBACKS=http://localhost:8000/hook?a=b&c=d").splitlines()
    assert last.endswith("worker.demo.up --port '7101' --callbacks 'http://localhost:8000/hook?a=b&c=d'")
