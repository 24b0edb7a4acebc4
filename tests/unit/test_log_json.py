"""The log as JSON: each record is one object with the known fields, for any values."""

from __future__ import annotations

import io
import json
import logging
import sys
from typing import Any

import pytest

from tasks import ImageBlocked
from tests.support.hostile_text import HOSTILE, is_clean
from tests.support.json_log import ALWAYS
from worker.observability.job_fields import about_job, job_extra, note_code
from worker.observability.log_json import JsonLineFormatter
from worker.observability.redaction import log_defect


def logged(*arguments: Any, name: str = "worker.test", level: int = logging.INFO, **options: Any) -> dict[str, Any]:
    logger, written = _logger(name)
    logger.log(level, *arguments, **options)
    return _only(written)


def _logger(name: str) -> tuple[logging.Logger, io.StringIO]:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JsonLineFormatter("model"))
    logger = logging.Logger(name)
    logger.addHandler(handler)
    return logger, written


def _only(written: io.StringIO) -> dict[str, Any]:
    text = written.getvalue()
    assert text.endswith("}\n")
    assert is_clean(text.removesuffix("\n")), text
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ("Job %s has ended.", HOSTILE),
        ("%s", ValueError(HOSTILE)),
        (HOSTILE,),
        ('", "level": "CRITICAL", "x": "',),
        ({"level": "CRITICAL", "job_id": HOSTILE},),
        ("%s of two", HOSTILE, HOSTILE),
        ("Task %(name)s[%(id)s]", {"name": HOSTILE, "id": HOSTILE, "level": "CRITICAL"}),
    ],
    ids=range(7),
)
def test_no_value_forges_a_record_or_a_field(arguments: tuple[Any, ...]) -> None:
    record = logged(*arguments)
    assert list(record) == ALWAYS
    assert (record["level"], record["logger"], record["process"]) == ("INFO", "worker.test", "model")
    assert is_clean(record["message"])


def test_what_a_library_attaches_to_its_records_is_left_out() -> None:
    attached = {"prompt": "s3cr3t", "data": {"id": "forged", "name": "forged"}, "code": "forged", "level": "CRITICAL"}
    assert list(logged("A request.", name="httpx", extra=attached)) == ALWAYS


def test_celerys_own_records_about_a_job_have_its_fields() -> None:
    data = {"id": HOSTILE, "name": "idefics.caption", "args": "s3cr3t"}
    record = logged("Task %(name)s[%(id)s] received", data, name="celery.worker.strategy", extra={"data": data})
    assert record["job_id"] == HOSTILE
    assert record["task"] == "idefics.caption"
    assert "s3cr3t" not in json.dumps(record)
    record = logged("Terminating %s (%s)", "a", 15, name="celery.worker.control")
    assert record["job_id"] == "a"


def test_records_of_a_thread_that_works_on_a_job_are_about_it() -> None:
    with about_job("a", "idefics.caption"):
        assert logged("A warning.", name="PIL")["job_id"] == "a"
        note_code("image_blocked")
        record = logged("It failed.")
        with about_job("b"):
            assert "task" not in logged("Another.")
    assert (record["job_id"], record["task"], record["code"]) == ("a", "idefics.caption", "image_blocked")
    assert "job_id" not in logged("No job.")


def test_a_single_record_can_name_its_job() -> None:
    record = logged("It ends.", extra=job_extra("a", code="internal"))
    assert (record["job_id"], record["code"]) == ("a", "internal")
    assert "task" not in record


def test_a_traceback_is_a_field_of_its_own() -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        record = logged("It failed.", exc_info=sys.exc_info())
    assert record["traceback"].startswith("Traceback (most recent call last):\n")
    assert "ValueError" in record["traceback"]
    assert list(record) == [*ALWAYS, "traceback"]


def test_a_defect_has_its_class_and_its_place_and_no_message() -> None:
    logger, written = _logger("worker.test")
    with pytest.raises(KeyError) as raised:
        raise KeyError("s3cr3t") from ImageBlocked("s3cr3t")
    log_defect(logger, raised.value, "a", "idefics.caption")
    assert raised.value.args == ("s3cr3t",)
    record = _only(written)
    assert (record["level"], record["job_id"], record["code"]) == ("ERROR", "a", "internal")
    assert record["traceback"].endswith("\nKeyError")
    assert "ImageBlocked:" not in record["traceback"]
