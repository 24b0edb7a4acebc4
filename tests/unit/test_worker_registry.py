"""What workers say that they read, and what an app's options make of it."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

from tasks.setup_check import unreadable, unseen
from tasks.worker_registry import WorkerOptions

DEFAULT = WorkerOptions(("\x06\x16", ":"), tuple(range(10)), "", "", "here")


def _app(**options: Any) -> Celery:
    app = Celery(set_as_current=False)
    app.conf.broker_transport_options = options
    return app


def test_worker_options_are_read_as_they_were_written() -> None:
    assert WorkerOptions.read(DEFAULT.written()) == DEFAULT


@pytest.mark.parametrize("options", [{}, {"sep": ":"}, {"priority_steps": [0]}, {"global_keyprefix": ""}])
def test_options_that_workers_share_are_accepted(options: dict[str, Any]) -> None:
    assert unseen(_app(**options), DEFAULT) is None


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"sep": "#"}, "IDEFICS_PRIORITY_SEPARATOR"),
        ({"priority_steps": [0, 10]}, "IDEFICS_PRIORITY_STEPS"),
        ({"global_keyprefix": "x"}, "IDEFICS_BROKER_KEY_PREFIX"),
    ],
)
def test_options_that_workers_do_not_share_are_named_with_the_cure(options: dict[str, Any], names: str) -> None:
    assert names in (unseen(_app(**options), DEFAULT) or "")


def test_a_backend_that_may_have_answers_is_not_refused() -> None:
    assert unreadable(Celery(backend="cache+memory://", set_as_current=False).backend) is None
