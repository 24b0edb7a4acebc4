"""What a worker's log tells: a job's error in one line, defects whole, from the level that was asked for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tasks import Caption, Client, Complete, ImageBlocked, PromptTooLong, WorkerLost
from tests.support.waiting import eventually
from worker.demo import stack
from worker.models.fake import POISON

pytestmark = pytest.mark.timeout(120)


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
                submitted.result(timeout=60)
            eventually(lambda error=error: _lines_with(log, error.__name__))
            told = _lines_with(log, error.__name__)
            assert len(told) == 1, told
            assert " INFO " in told[0]
            assert error.code in told[0]
    assert "Traceback" not in log.read_text()


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
        assert job.result(timeout=60).text == "lo"
    found = set(re.findall(r"^\d\S+ \S+ (\w+) \[\d+\]", log.read_text(), re.MULTILINE))
    assert found <= levels
    assert ("INFO" in found) == ("INFO" in levels)


def test_a_log_file_gets_the_lines_of_both_processes(tmp_path: Path) -> None:
    log, file = tmp_path / "log", tmp_path / "file"
    with stack.broker() as server, _worker(server, log, "--logfile", str(file)):
        job = Client(server.url).submit(Complete(prompt=["Hello"], max_new_tokens=2))
        assert job.result(timeout=60).text == "lo"
    # The parent tells that it came, the model process that it ended.
    assert f"[{job.id}] received" in file.read_text()
    assert f"[{job.id}] succeeded" in file.read_text()
    assert job.id not in log.read_text()


def test_the_log_tells_what_the_model_needs_and_has_no_progress_bars(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with stack.broker() as server, stack.worker(server, settings={"MODEL": "demo"}, log=log):
        pass
    assert "\n    Prompt   at most 2,048 tokens, pictures included\n" in log.read_text()
    assert "%|" not in log.read_text()
    assert "\r" not in log.read_text()


def _worker(server: stack.Broker, log: Path, *arguments: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """A worker of which the log need not tell that it is ready."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("IDEFICS_")}
    environment |= {"IDEFICS_BROKER_URL": server.url, "IDEFICS_RESULT_BACKEND": server.results}
    command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", *arguments]
    return stack.started(command, log=log, environment=environment | {"IDEFICS_MODEL": "fake"})
