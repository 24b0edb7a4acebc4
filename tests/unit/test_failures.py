"""What a failure in the model process says, and how little of it is copied."""

from __future__ import annotations

import traceback
from typing import NoReturn

from billiard.einfo import ExceptionInfo

import worker.model_process  # noqa: F401 - it makes billiard copy code once
from tasks.errors import ImageInvalid


def _fail() -> NoReturn:
    raise ImageInvalid("broken: send another.")


def _info() -> ExceptionInfo:
    try:
        _fail()
    except ImageInvalid:
        return ExceptionInfo()


def test_a_failure_still_has_its_text_and_frames() -> None:
    info = _info()
    assert info.traceback.rstrip().endswith("ImageInvalid: broken: send another.")
    assert "_fail()" in "".join(traceback.format_tb(info.tb))


def test_frames_of_one_function_share_its_copied_code() -> None:
    first, second = _info().tb, _info().tb
    assert first.tb_frame is not second.tb_frame
    assert first.tb_frame.f_code is second.tb_frame.f_code
    assert first.tb_next.tb_frame.f_code is not first.tb_frame.f_code
