"""What strangers choose moves no cursor, begins no line and reorders nothing, in a terminal or in the log."""

from __future__ import annotations

import io
import json
import logging
import sys
from typing import Any

import pytest
from click.testing import CliRunner

from tasks import Complete
from tasks.cli import main
from tasks.cli.console import tabbed
from tasks.cli.deliveries import row
from tasks.failed import FailedJob, FailedJobs
from tasks.outbox import Delivery
from tasks.printable import escaped, escaped_json
from tasks.testing import canned
from tests.support.hostile_text import FORGED, HOSTILE, MARKS, is_clean
from worker import health
from worker.demo import stack
from worker.observability.log_lines import LineFormatter, Lines


@pytest.mark.parametrize("mark", MARKS, ids=ascii)
def test_a_mark_is_shown_as_an_escape(mark: str) -> None:
    shown = escaped(f"a{mark}b")
    assert is_clean(shown)
    assert shown.startswith("a\\")
    assert json.loads(escaped_json(json.dumps(mark, ensure_ascii=False))) == mark
    assert is_clean(escaped_json(json.dumps(mark, ensure_ascii=False)))


@pytest.mark.parametrize(
    "text", ["", "a cat", "ein Bär", "猫", "👩\u200d🚀", "\u0646\u0627\u0645\u0647\u200c\u0627\u06cc", "a\xa0b", "\\n"]
)
def test_ordinary_text_is_unchanged(text: str) -> None:
    assert escaped(text) == text
    assert escaped_json(text) == text


# The log


def logged(*arguments: Any, level: int = logging.INFO, **options: Any) -> str:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(LineFormatter())
    logger = logging.Logger("worker.test")
    logger.addHandler(handler)
    logger.log(level, *arguments, **options)
    return written.getvalue()


def has_one_record(text: str) -> bool:
    first, *rest = text.removesuffix("\n").splitlines()
    return (
        first[:4].isdecimal() and all(line.startswith("    ") for line in rest) and all(map(is_clean, text.split("\n")))
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("Job %s has ended.", HOSTILE),
        ("Job %r has ended.", HOSTILE),
        ("%s", ValueError(HOSTILE)),
        ("%s and %r of %d", {"a": [HOSTILE]}, ValueError(HOSTILE), 3),
        ("Task %(name)s[%(id)s] raised unexpected: %(exc)s\n", {"name": HOSTILE, "id": HOSTILE, "exc": HOSTILE}),
        ("Cannot connect to %s.\nAgain in %.2f s.\n", HOSTILE, 1.5),
        (HOSTILE,),
        (f"% {HOSTILE}",),
        (ValueError(HOSTILE),),
        ("%s of two", HOSTILE, HOSTILE),
        ("%d of two", HOSTILE),
    ],
    ids=range(11),
)
def test_a_record_is_one_line_for_any_values(arguments: tuple[Any, ...]) -> None:
    text = logged(*arguments)
    assert has_one_record(text), text
    assert len([line for line in text.splitlines() if line.startswith("2")]) == 1


def test_a_traceback_keeps_its_lines_and_forges_none() -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        text = logged("It failed.", exc_info=sys.exc_info())
    assert has_one_record(text)
    assert "\n    Traceback (most recent call last):\n" in text
    assert FORGED in text


def test_lines_of_our_own_log_messages_are_kept() -> None:
    assert logged("It failed: %s", Lines("KeyError\n  File x\n\x1b")).endswith("KeyError\n      File x\n    \\x1b\n")


def test_the_probe_shows_a_reason_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert is_clean(health.on_one_line(f"gpu0@host: {HOSTILE}"))


# The terminal


def test_a_deliverys_columns_hold_no_other_column_and_no_other_line() -> None:
    url = f"https://{HOSTILE.replace('[', '').replace(']', '')}/"
    shown = tabbed(row(Delivery(HOSTILE, HOSTILE, HOSTILE, url, HOSTILE, HOSTILE, note=HOSTILE)))
    assert all(map(is_clean, shown.split("\t")))
    assert shown.count("\t") == 7


def test_a_failed_job_is_listed_and_shown_without_marks(broker: stack.Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    job = FailedJob(
        id=HOSTILE,
        task=HOSTILE,
        code=HOSTILE,
        message=HOSTILE,
        host=HOSTILE,
        attempts=1,
        submitted_at=None,
        failed_at=1.0,
    )
    monkeypatch.setattr(FailedJobs, "__iter__", lambda jobs: iter([job]))
    monkeypatch.setattr(FailedJobs, "get", lambda *_: job)
    monkeypatch.setattr(FailedJobs, "signature", lambda *_: {HOSTILE: HOSTILE})
    for arguments in (["ls"], ["ls", "--json"], ["show", "x"], ["show", "x", "--reveal"]):
        outcome = CliRunner().invoke(main, ["--broker", broker.url, "failed", *arguments])
        assert outcome.exit_code == 0, outcome.output
        assert all(map(is_clean, outcome.stdout.split("\n")))
        assert not [line for line in outcome.stdout.splitlines() if line.startswith(FORGED)]


def test_a_failed_jobs_reason_is_one_line(broker: stack.Broker) -> None:
    record = {"status": "FAILURE", "result": {"exc_type": "Internal", "exc_message": ["internal", HOSTILE]}}
    record["result"]["exc_module"] = "idefics_jobs.errors"  # type: ignore[index]
    broker.connect(1).set("celery-task-meta-hostile", json.dumps({**record, "task_id": "hostile"}), ex=60)
    outcome = CliRunner().invoke(main, ["--broker", broker.url, "result", "hostile"])
    assert outcome.exit_code == 1
    assert is_clean(outcome.stderr.removesuffix("\n")), outcome.stderr
    unknown = CliRunner().invoke(main, ["--broker", broker.url, "failed", "show", HOSTILE.replace("\0", "")])
    assert is_clean(unknown.stderr.removesuffix("\n"))


def test_a_jobs_answer_is_shown_as_json_without_marks(broker: stack.Broker) -> None:
    answer = canned(HOSTILE, Complete(prompt=["?"])).model_dump(mode="json")
    record = {"status": "SUCCESS", "result": answer, "task_id": "answered"}
    broker.connect(1).set("celery-task-meta-answered", json.dumps(record), ex=60)
    outcome = CliRunner().invoke(main, ["--broker", broker.url, "result", "answered"])
    assert outcome.exit_code == 0, outcome.output
    assert all(map(is_clean, outcome.stdout.split("\n")))
    assert json.loads(outcome.stdout)["text"] == HOSTILE
