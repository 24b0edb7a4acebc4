"""Jobs from payload to result, with the fake model."""

from __future__ import annotations

import json
import time

import pytest

from tasks.results import Result
from tests.support.pictures import data_uri, png
from tests.unit.service.jobs import CONTEXT, SOON, Start, complete, job
from worker.jobs.runs import JobContext
from worker.jobs.service import Service
from worker.models.fake import FakeModel

# Answers


def test_a_job_gets_its_answer(service: Service) -> None:
    result = service.run(complete("the red door", max_new_tokens=4), CONTEXT)
    assert result.text == "door"
    assert result.finish_reason == "length"
    assert (result.label, result.scores) == (None, None)
    assert result.model.id == "fake"
    assert result.usage.prompt_tokens == len("the red door")
    assert result.usage.completion_tokens == 4


def test_a_job_that_does_not_say_gets_the_default_number_of_tokens(start: Start) -> None:
    assert start(default_new_tokens=7).run(complete("a" * 50), CONTEXT).text == "a" * 7


def test_the_default_number_of_tokens_is_never_above_the_maximum(start: Start) -> None:
    assert start(default_new_tokens=70, max_new_tokens=5).run(complete("a" * 90), CONTEXT).text == "a" * 5


def test_an_image_becomes_part_of_the_prompt(service: Service) -> None:
    def answer(colour: str) -> str:
        return service.run(job("caption", image=data_uri(png(colour)), max_new_tokens=10), CONTEXT).text

    assert answer("red") == answer("red") != answer("blue")


def test_several_images_keep_their_order(service: Service) -> None:
    def answer(*colours: str) -> str:
        images = [data_uri(png(colour)) for colour in colours]
        return service.run(job("complete", prompt=images, max_new_tokens=60), CONTEXT).text

    assert answer("red", "blue", "green") != answer("green", "blue", "red")
    assert answer("red", "blue", "red")[:10] == answer("red", "blue", "red")[-10:]


def test_classify_answers_with_a_label_and_a_probability_for_each(service: Service) -> None:
    result = service.run(job("classify", image=data_uri(png()), labels=["food", "animal"]), CONTEXT)
    assert (result.text, result.label, result.scores) == ("food", "food", {"food": 1.0, "animal": 0.0})
    assert result.finish_reason == "stop"


@pytest.mark.parametrize(
    ("stop", "text"),
    [([], "one.two.three"), (["."], "one"), (["three", "two"], "one."), (["four"], "one.two.three"), (["one"], "")],
)
def test_the_text_ends_before_the_first_stop_string(service: Service, stop: list[str], text: str) -> None:
    assert service.run(complete("one.two.three", max_new_tokens=13, stop=stop), CONTEXT).text == text


def test_metadata_is_echoed(service: Service) -> None:
    metadata = {"row": 7, "tags": ["a", None]}
    assert service.run(complete("a", metadata=metadata), CONTEXT).metadata == metadata


def test_a_result_is_json(service: Service) -> None:
    result = service.run(complete("a"), CONTEXT)
    assert Result.model_validate(json.loads(json.dumps(result.model_dump(mode="json")))) == result


# Timing


def test_no_time_is_negative(service: Service) -> None:
    timing = service.run(job("caption", image=data_uri(png()), prompt="A"), CONTEXT).timing
    assert all(seconds >= 0 for seconds in timing.model_dump().values())


def test_the_time_in_the_queue_is_counted_from_submission(service: Service) -> None:
    context = JobContext(id="job", submitted_at=time.time() - 3)
    assert 3 <= service.run(complete("a"), context).timing.queued_s < 3 + SOON


def test_a_producer_with_a_fast_clock_waited_no_negative_time(service: Service) -> None:
    assert service.run(complete("a"), JobContext(id="job", submitted_at=time.time() + 60)).timing.queued_s == 0


def test_a_result_tells_the_runs_before_it(service: Service) -> None:
    assert service.run(complete("a"), JobContext(id="job", retries=2)).timing.retries == 2


def test_the_models_time_is_told(start: Start) -> None:
    service = start(FakeModel(step_s=0.01))
    assert service.run(complete("a" * 9, max_new_tokens=5), CONTEXT).timing.generate_s >= 0.05
