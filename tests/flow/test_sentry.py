"""Sentry's real SDK in each process of a worker: defects are events with their jobs, producers' errors are none."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest

from tasks import Callback, Caption, Client
from tests.flow.test_log import RECEIVING
from tests.support.pictures import data_uri, png
from tests.support.receiver import Receiver
from tests.support.sabotage import SECRET
from tests.support.sentry import SentryReceiver
from tests.support.stand import callbacks_worker
from tests.support.waiting import eventually
from worker.demo import stack

PROCESSES = ("parent", "model", "callbacks")


def test_a_defect_is_one_event_with_its_job_and_a_producers_error_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Receiver().open() as receiver, SentryReceiver().open() as sentry, ExitStack() as started:
        monkeypatch.setenv("SENTRY_DSN", sentry.dsn)
        server = started.enter_context(stack.broker())
        settings = {
            "SETUP": "tests.support.sabotage:set_up_with_sentry",
            "CALLBACK_PORTS": str(receiver.port),
            **RECEIVING,
        }
        started.enter_context(
            stack.worker(server, settings={"MODEL": "fake", "MAX_RETRIES": "0", **settings}, log=tmp_path / "log")
        )
        started.enter_context(callbacks_worker(server, tmp_path / "callbacks", settings))
        client = Client(server.url, check_callbacks=False)
        callback = Callback(url=receiver.url, key_id="main")
        prompted = {"image": f"{data_uri(png())}", "prompt": SECRET}
        for id in PROCESSES:
            client.submit(Caption(**prompted, callback=callback), task_id=id)
        client.submit(Caption(image=f"http://10.1.2.3/{SECRET}", callback=callback), task_id="blocked")
        client.app.send_task("idefics.caption", kwargs={"image": SECRET}, queue="idefics", task_id="invalid")
        client.app.send_task("idefics.unknown", kwargs={"image": SECRET}, queue="idefics", task_id="unknown")
        eventually(lambda: {event["tags"]["process"] for event in sentry.events} == set(PROCESSES))
        eventually(lambda: {client.status(id) for id in ("blocked", "invalid", "unknown")} == {"failed"})
        # The callbacks of all four have been attempted; the one that met the defect is not sent.
        eventually(lambda: len(receiver.calls) == 3)
    for process in PROCESSES:
        (event,) = sentry.of(process)
        assert event["tags"]["process"] == process
        assert event["tags"]["task"] == "idefics.caption"
        assert event["exception"]["values"][0]["type"] == "LookupError"
        assert event["exception"]["values"][0]["stacktrace"]["frames"]
    assert sentry.of("model")[0]["tags"]["code"] == "internal"
    assert len(sentry.events) == len(PROCESSES)
    assert SECRET not in json.dumps(sentry.events)
    assert "http" not in json.dumps([event.get("logentry") for event in sentry.events])


@pytest.mark.parametrize(("dsn", "cure"), [("", "SENTRY_DSN is not set"), ("no dsn", "IDEFICS_SETUP")])
def test_a_start_without_a_project_of_sentrys_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dsn: str, cure: str
) -> None:
    monkeypatch.setenv("SENTRY_DSN", dsn)
    settings = {"MODEL": "fake", "SETUP": "worker.observability.sentry:set_up"}
    with (
        stack.broker() as server,
        pytest.raises(stack.StartFailed, match=cure),
        stack.worker(server, settings=settings, log=tmp_path / "log"),
    ):
        pass
