"""A checkpoint's golden questions, which it must answer before it serves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tasks.errors import InvalidRequest, OutOfMemory
from tasks.verification import TOLERANCES
from tests.support.pictures import data_uri, png
from tests.unit.service.jobs import CONTEXT, Start, complete, job
from worker.engine.row import Picture
from worker.jobs.service import Service
from worker.models.fake import FakeCodec, FakeModel


def golden(folder: Path, text: str) -> Path:
    (folder / "a.png").write_bytes(png())
    arguments = {"prompt": "This is a red door", "max_new_tokens": 4}
    form = {"task": "idefics.caption", "image": "a.png", "arguments": arguments, "text": text}
    (folder / "golden.json").write_text(json.dumps(form))
    return folder


def test_a_model_that_says_what_is_right_may_serve(service: Service, tmp_path: Path) -> None:
    service.check_golden(golden(tmp_path, " door\n"))


def test_a_model_that_says_something_else_must_not_serve(service: Service, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"'door'.*'wall'"):
        service.check_golden(golden(tmp_path, "wall"))


@pytest.mark.parametrize(("right", "off"), [({"a": 1.0, "b": 0.0}, 0.0), ({"a": 0.99, "b": 0.01}, 0.01)])
def test_golden_probabilities_are_right_within_the_precisions_tolerance(
    service: Service, tmp_path: Path, right: dict[str, float], off: float
) -> None:
    folder = golden(tmp_path, " door\n")
    form = json.loads((folder / "golden.json").read_text())
    form["more"] = [{"task": "idefics.classify", "arguments": {"labels": ["a", "b"]}, "scores": right}]
    (folder / "golden.json").write_text(json.dumps(form))
    if off <= TOLERANCES["float32"]:
        service.check_golden(folder)
    else:
        with pytest.raises(RuntimeError, match=r"'a' 1\.0000 where 0\.9900 is right; 1 of 2"):
            service.check_golden(folder)


@pytest.mark.parametrize("has_folder", [True, False])
def test_without_a_golden_picture_any_answer_will_do(start: Start, tmp_path: Path, has_folder: bool) -> None:
    model = FakeModel()
    start(model).check_golden(tmp_path if has_folder else None)
    assert model.batches


def test_a_model_that_cannot_answer_at_all_must_not_serve(start: Start) -> None:
    class Broken(FakeModel):
        def run(self, *args: Any) -> None:
            raise ValueError("NaN")

    with pytest.raises(Exception, match="ValueError"):
        start(Broken()).check_golden(None)


def test_too_little_memory_for_a_job_is_out_of_memory(start: Start) -> None:
    class Large(FakeCodec):
        def picture(self, image: Image.Image) -> Picture:
            raise MemoryError

    model = FakeModel()
    model.codec = Large()
    service = start(model)
    for arguments in ({"images": [data_uri(png())]}, {"images": [data_uri(png())] * 3}):
        with pytest.raises(OutOfMemory):
            service.run(job("write", **arguments), CONTEXT)


@pytest.mark.parametrize(
    "options",
    [
        {"deadline_s": 1e308},
        {"deadline_s": 1e19},
        {"temperature": 1e-40},
        {"temperature": 1e-5, "seed": 2**63 - 1},
        {"temperature": 10, "top_p": 5e-324, "seed": 0},
        {"top_k": 1_000_000, "temperature": 1.0},
    ],
)
def test_numbers_at_the_ends_of_their_ranges_are_answered(service: Service, options: dict[str, Any]) -> None:
    assert service.run(complete("ab", max_new_tokens=2, **options), CONTEXT).usage.completion_tokens == 2


@pytest.mark.parametrize("name", ["deadline_s", "temperature", "top_p"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_refused(name: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=name):
        complete("ab", **{name: value})
