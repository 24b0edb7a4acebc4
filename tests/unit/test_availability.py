"""Which errors say that Redis is away: what a server, kombu and Celery really raise."""

from __future__ import annotations

import errno
import socket

import pytest
import redis
from celery.exceptions import BackendStoreError
from kombu.exceptions import ConnectionLimitExceeded, OperationalError
from redis._parsers.base import BaseParser

from tasks.availability import is_away, is_full

REFUSED = "Command # 1 (SETEX celery-task-meta-1 60 {}) of pipeline caused error: "


def wrapped(error: Exception, into: type[Exception] = OperationalError) -> Exception:
    try:
        raise into(str(error)) from error
    except into as outer:
        return outer


@pytest.mark.parametrize(
    "answer",
    [
        "OOM command not allowed when used memory > 'maxmemory'.",
        "OOM command not allowed when used memory > 'maxmemory'. script: 1f2e, on @user_script:4.",
        "ERR Error running script (call to f_1f2e): @user_script: 9: -OOM command not allowed",
        "ERR Error running script (call to f_1f2e): @user_script:9: -READONLY You can't write against a replica.",
        "MISCONF Errors writing to the AOF file: No space left on device",
        "READONLY You can't write against a read only replica.",
        "NOREPLICAS Not enough good replicas to write.",
        "LOADING Redis is loading the dataset in memory",
        "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
        "CLUSTERDOWN Hash slot not served",
        "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
        "TRYAGAIN Multiple keys request during rehashing of slot",
        "ERR max number of clients reached",
    ],
)
def test_refusals_that_pass_are_unavailability(answer: str) -> None:
    error = BaseParser.parse_error(answer)
    assert is_away(error)
    assert is_away(wrapped(error))
    assert is_away(wrapped(wrapped(error), BackendStoreError))
    assert is_full(error) is answer.startswith(("OOM", "MISCONF"))


@pytest.mark.parametrize(
    "answer",
    [
        "WRONGTYPE Operation against a key holding the wrong kind of value",
        "NOPERM User producer has no permissions to run the 'eval' command",
        "ERR user_script:3: attempt to compare nil with number script: 1f2e, on @user_script:3.",
        "ERR unknown command 'OOM', with args beginning with: ",
        "BUSYGROUP Consumer Group name already exists",
        "NOSCRIPT No matching script.",
    ],
)
def test_permanent_refusals_are_no_unavailability(answer: str) -> None:
    error = BaseParser.parse_error(answer)
    assert not is_away(error)
    assert not is_away(wrapped(error))
    assert not is_full(error)


def test_a_pipelines_error_is_told_by_the_server_not_by_what_was_sent() -> None:
    assert is_away(redis.ResponseError(REFUSED + "NOREPLICAS Not enough good replicas to write."))
    assert not is_away(redis.ResponseError(REFUSED.replace("{}", ": OOM x") + "WRONGTYPE Operation against a key"))


@pytest.mark.parametrize(
    "error",
    [
        redis.ConnectionError("Connection refused"),
        redis.TimeoutError("Timeout reading from socket"),
        redis.exceptions.MaxConnectionsError("Too many connections"),
        redis.exceptions.InvalidResponse("Protocol Error"),
        ConnectionResetError(),
        TimeoutError(),
        socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.ENFILE, "Too many open files in system"),
        OSError(errno.EHOSTUNREACH, "No route to host"),
        ConnectionLimitExceeded(4),
        OperationalError("[Errno 111] Connection refused"),
    ],
)
def test_network_errors_and_shortages_are_unavailability(error: Exception) -> None:
    assert is_away(error)
    assert is_away(wrapped(error))
    assert not is_full(error)


@pytest.mark.parametrize(
    "error", [ValueError(), KeyError("x"), OSError(errno.ENOENT, "x"), redis.DataError(), Exception()]
)
def test_a_defect_is_no_unavailability(error: Exception) -> None:
    assert not is_away(error)
    assert not is_away(wrapped(error))
