"""A task's own error, as Celery gets it."""

from __future__ import annotations

import traceback

import pytest

from tasks.errors import InvalidRequest
from worker.app import app


def test_a_failure_shows_no_frame_below_its_task() -> None:
    with pytest.raises(InvalidRequest, match="prompt") as failure:
        app.tasks["idefics.complete"].run(prompt=[])
    assert traceback.extract_tb(failure.tb)[-1].name == "run"
    assert failure.value.__suppress_context__
