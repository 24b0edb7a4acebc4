"""What a worker's log tells: a job's error in one line, defects whole, from the level and in the format asked for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest

from tasks import Callback, Caption, Client, Complete, ImageBlocked, InvalidRequest, PromptTooLong, WorkerLost
from tests.support.json_log import about, records
from tests.support.pictures import data_uri, png
from tests.support.receiver import SECRET as KEY
from tests.support.receiver import Receiver
from tests.support.sabotage import SECRET
from tests.support.stand import callbacks_worker
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack
from worker.models import DEMO
from worker.models.fake import POISON

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TINY = data_uri(png())
#: Settings with which a receiver on this machine gets callbacks.
RECEIVING = {
    "CALLBACK_KEYS": f"main={KEY}",
    "CALLBACK_ALLOW_HTTP": "true",
    "CALLBACK_ALLOW_NETWORKS": "127.0.0.0/8",
}


def test_a_jobs_error_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    log = tmp_path / "log"
    settings = {"MODEL": "fake:0.01", "MAX_RETRIES": "0", "MAX_PROMPT_TOKENS": "100"}
    with stack.broker() as server, stack.worker(server, settings=settings, log=log):
        client = Client(server.url)
        asked = {
            ImageBlocked: Caption(image="http://127.0.0.1/cat.png"),
            PromptTooLong: Complete(prompt=["a" * 1_000]),
            # The pool ends this one, in the parent.
            WorkerLost: Complete(prompt=[POISON]),
        }
        for error, job in asked.items():
            submitted = client.submit(job)
            with pytest.raises(error):
                submitted.result(timeout=120)
            eventually(lambda error=error: _lines_with(log, error.__name__))
            told = _lines_with(log, error.__name__)
            assert len(told) == 1, told
            assert " INFO " in told[0]
            assert error.code in told[0]
        _tells_of_each_refused_message_in_one_line(log, client)
    assert "Traceback" not in log.read_text()


def _tells_of_each_refused_message_in_one_line(log: Path, client: Client) -> None:
    refused = {"job-7": ("idefics.caption", {"image": 7}), "job-8": ("idefics.unknown", {})}
    for job, (task, arguments) in refused.items():
        client.app.send_task(task, kwargs=arguments, queue="idefics", task_id=job)
        with pytest.raises(InvalidRequest):
            client.result(job, timeout=120)
        eventually(lambda job=job: any("received" not in line for line in _lines_with(log, job)))
    told = [line for job in refused for line in _lines_with(log, job) if "received" not in line]
    assert len(told) == 2, told
    assert "invalid_request" in told[0]
    assert not re.search("WARNING|ERROR|CRITICAL|Traceback", "".join(told))


def _lines_with(log: Path, text: str) -> list[str]:
    return [line for line in log.read_text().splitlines() if text in line]


@pytest.mark.parametrize(
    ("arguments", "levels"),
    [([], {"INFO", "WARNING"}), (["--loglevel", "WARNING"], {"WARNING"}), (["-l", "critical"], set())],
)
def test_the_commands_level_goes_before_the_settings(tmp_path: Path, arguments: list[str], levels: set[str]) -> None:
    log = tmp_path / "log"
    with stack.broker() as server, _worker(server, log, *arguments):
        # A job with a warning: the callback that it asks for may not be called.
        job = Client(server.url).submit(Complete(prompt=["Hello"], max_new_tokens=2))
        assert job.result(timeout=120).text == "lo"
    found = set(re.findall(r"^\d\S+ \S+ (\w+) \[\d+\]", log.read_text(), re.MULTILINE))
    assert found <= levels
    assert ("INFO" in found) == ("INFO" in levels)


def test_a_log_file_gets_the_lines_of_both_processes(tmp_path: Path) -> None:
    log, file = tmp_path / "log", tmp_path / "file"
    with stack.broker() as server, _worker(server, log, "--logfile", str(file)):
        job = Client(server.url).submit(Complete(prompt=["Hello"], max_new_tokens=2))
        assert job.result(timeout=120).text == "lo"
    # The parent tells that it came, the model process that it ended.
    assert f"[{job.id}] received" in file.read_text()
    assert f"[{job.id}] succeeded" in file.read_text()
    assert job.id not in log.read_text()


def test_each_line_of_all_three_processes_is_a_record(tmp_path: Path) -> None:
    log, callbacks_log = tmp_path / "log", tmp_path / "callbacks"
    with Receiver().open() as receiver, stack.broker() as server, ExitStack() as workers:
        settings = {
            "LOG_FORMAT": "json",
            "SETUP": "tests.support.sabotage:set_up",
            "CALLBACK_PORTS": str(receiver.port),
            **RECEIVING,
        }
        workers.enter_context(stack.worker(server, settings={"MODEL": "fake", "MAX_RETRIES": "0", **settings}, log=log))
        workers.enter_context(callbacks_worker(server, callbacks_log, settings))
        client = Client(server.url, check_callbacks=False)
        callback = Callback(url=receiver.url, key_id="main")
        for id in ("well", "blocked", "parent", "model", "callbacks"):
            image = "http://10.1.2.3/cat.png" if id == "blocked" else TINY
            client.submit(Caption(image=image, callback=callback), task_id=id)
        eventually(lambda: all(_told(log, id) for id in ("well", "blocked", "parent", "model")))
        _tells_of_each_refused_message_in_one_line(log, client)
        eventually(lambda: all(_told(callbacks_log, id) for id in ("well", "blocked", "parent", "model", "callbacks")))
    all_records = records(log) + records(callbacks_log)
    assert {record["process"] for record in all_records} == {"parent", "model", "callbacks"}
    assert SECRET not in log.read_text() + callbacks_log.read_text()
    tasks = {record["job_id"]: record["task"] for record in all_records if "job_id" in record}
    assert tasks.pop("job-8") == "idefics.unknown"
    assert set(tasks.values()) == {"idefics.caption"}
    _has_no_defects(all_records, "well", None)
    _has_no_defects(all_records, "blocked", "image_blocked")
    for process in ("parent", "model", "callbacks"):
        (defect,) = [record for record in all_records if record["level"] == "ERROR" and record["job_id"] == process]
        assert defect["process"] == process
        # The job of the failed callback has ended well.
        assert defect.get("code") == (None if process == "callbacks" else "internal")
        assert defect["traceback"].endswith("\nLookupError")


def _told(log: Path, id: str) -> bool:
    return len(about(log, id)) >= (2 if log.name == "log" else 1)


def _has_no_defects(all_records: list[dict[str, Any]], id: str, code: str | None) -> None:
    found = [record for record in all_records if record.get("job_id") == id]
    assert {record["level"] for record in found} == {"INFO"}
    assert not [record for record in found if "traceback" in record]
    assert found[-1].get("code") == code


def test_a_json_log_file_gets_the_records_of_both_processes_from_the_commands_level_on(tmp_path: Path) -> None:
    log, file = tmp_path / "log", tmp_path / "file"
    with (
        stack.broker() as server,
        _worker(server, log, "--logfile", str(file), "-l", "debug", IDEFICS_LOG_FORMAT="json"),
    ):
        job = Client(server.url).submit(Complete(prompt=["Hello"], max_new_tokens=2))
        assert job.result(timeout=120).text == "lo"
    assert {record["process"] for record in about(file, job.id)} == {"parent", "model"}
    assert "DEBUG" in {record["level"] for record in records(file)}
    assert job.id not in log.read_text()


@pytest.mark.parametrize(
    ("app", "option"),
    [
        ("worker.app", "log_format=x"),
        ("worker.app", "redirect_stdouts=false"),
        ("worker.app", "log_color=true"),
        ("worker.callbacks", "log_format=x"),
    ],
)
def test_celerys_own_options_of_a_log_are_refused_with_the_cure(tmp_path: Path, app: str, option: str) -> None:
    log = tmp_path / "log"
    with stack.broker() as server, _worker(server, log, "--", f"worker.{option}", app=app) as process:
        assert process.wait(PATIENCE_S) != 0
    assert f"worker_{option.partition('=')[0]} cannot be set" in log.read_text()
    assert "IDEFICS_LOG_FORMAT" in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("app", "setup", "told"),
    [
        ("worker.app", "nowhere:set_up", "No module named 'nowhere'"),
        ("worker.app", "tests.support.sabotage:nothing", "has no attribute 'nothing'"),
        ("worker.app", "tests.support.sabotage:SECRET", "is not a function"),
        ("worker.app", "just_a_module", "such as shop.sentry:set_up"),
        ("worker.callbacks", "nowhere:set_up", "No module named 'nowhere'"),
    ],
)
def test_a_setup_that_cannot_be_called_ends_the_start_with_the_cure(
    tmp_path: Path, app: str, setup: str, told: str
) -> None:
    log = tmp_path / "log"
    with stack.broker() as server, _worker(server, log, app=app, IDEFICS_SETUP=setup) as process:
        assert process.wait(PATIENCE_S) != 0
    assert told in log.read_text()


def test_the_log_tells_what_the_model_needs_and_has_no_progress_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # From the hub's cache, since that has bars of its own beside those of the weights.
    log, settings = tmp_path / "log", {"MODEL": "some/model", "MODEL_REVISION": COMMIT, "OFFLINE": "true"}
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    shutil.copytree(DEMO, tmp_path / "hub" / "models--some--model" / "snapshots" / COMMIT)
    with stack.broker() as server, stack.worker(server, settings=settings, log=log):
        pass
    assert "\n    Prompt   at most 2,048 tokens, pictures included\n" in log.read_text()
    assert "%|" not in log.read_text()
    assert "\r" not in log.read_text()


def _worker(
    server: stack.Broker, log: Path, *arguments: str, app: str = "worker.app", **variables: str
) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """A worker of which the log need not tell that it is ready."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("IDEFICS_")}
    environment |= {"IDEFICS_BROKER_URL": server.url, "IDEFICS_RESULT_BACKEND": server.results, **variables}
    command = [sys.executable, "-m", "celery", "-A", app, "worker", *arguments]
    return stack.started(command, log=log, environment=environment | {"IDEFICS_MODEL": "fake"})
