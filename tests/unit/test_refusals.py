"""What a worker stores and logs of a message that is no job."""

from __future__ import annotations

import logging
from unittest.mock import Mock

import pytest

from tasks.failed import FailedBounds
from worker.queue.envelope import MessageRefused
from worker.queue.refusals import Refusals


@pytest.fixture
def refusals() -> Refusals:
    return Refusals(Mock(), FailedBounds(1, 1, 1))


def test_the_log_names_the_job_that_fails_by_a_dropped_message(
    refusals: Refusals, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    refusals(b"x" * 18_455, MessageRefused("Send less.", "a\x1b[2Jb"))
    # At INFO: its sender can read the job's error.
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "Message 'a\\x1b[2Jb' of 18455 bytes is dropped. Send less.")
    ]


def test_a_message_refused_for_another_reason_is_another_submission(refusals: Refusals) -> None:
    first, again, other = (refusals(b"x", MessageRefused(why, "a")) for why in ("no", "no", "not that either"))
    assert first == again != other
    assert other is not None
    assert other.begins
