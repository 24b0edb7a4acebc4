"""One job from its payload to its result, on the fake model and a real engine."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from config.settings import Settings
from tasks.errors import DeadlineExceeded, ImageBlocked, ImageInvalid, InvalidRequest, OutOfMemory, PromptTooLong
from tasks.payloads import Job, parse
from tasks.results import Result
from tests.support.pictures import data_uri, png
from tests.support.web import Quiet, serving
from worker.engine.engine import Engine
from worker.engine.interfaces import PromptContent
from worker.engine.row import Picture, Tokens
from worker.engine.scheduler import Limits
from worker.images.decode import open_image
from worker.images.host_limits import HostLimitReached
from worker.images.loader import DOWNLOADS
from worker.images.sources import SourceReader
from worker.jobs.golden import TOLERANCES
from worker.jobs.runs import CancellationError, JobContext
from worker.jobs.service import Service
from worker.models.fake import FakeCodec, FakeModel
from worker.runtime import gil

Start = Callable[..., Service]

#: Seconds that a test waits for what takes milliseconds.
SOON = 5.0
CONTEXT = JobContext(id="job")


def job(task: str, **arguments: Any) -> Job:
    return parse(f"idefics.{task}", arguments)


def complete(text: str, **arguments: Any) -> Job:
    return job("complete", prompt=[text], **arguments)


@pytest.fixture
def start() -> Iterator[Start]:
    """A service with these settings on a fake model."""
    engines: list[Engine] = []

    def service(model: FakeModel | None = None, **settings: Any) -> Service:
        model = model or FakeModel()
        engine = Engine(model, Limits(rows=8, tokens=1_000_000))
        engine.start()
        engines.append(engine)
        return Service(Settings(**settings), model.info, model.codec, engine)

    yield service
    for engine in engines:
        engine.stop()


@pytest.fixture
def service(start: Start) -> Service:
    return start()


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


def test_the_models_time_is_told(start: Start) -> None:
    service = start(FakeModel(step_s=0.01))
    assert service.run(complete("a" * 9, max_new_tokens=5), CONTEXT).timing.generate_s >= 0.05


# Refusals


def test_more_tokens_than_the_worker_gives_are_refused(start: Start) -> None:
    with pytest.raises(InvalidRequest, match=r"max_new_tokens is 6.*5"):
        start(max_new_tokens=5, default_new_tokens=5).run(complete("a", max_new_tokens=6), CONTEXT)


def test_a_chat_of_more_completion_tokens_than_a_worker_gives_is_cut_by_length(start: Start) -> None:
    for asked in (6, 10**30):
        chat = job("chat", messages=[{"role": "user", "content": "a" * 90}], max_completion_tokens=asked)
        result = start(max_new_tokens=5, default_new_tokens=5).run(chat, CONTEXT)
        assert (result.finish_reason, result.usage.completion_tokens) == ("length", 5)


def test_more_images_than_the_worker_takes_are_refused_before_any_is_fetched(start: Start) -> None:
    blocked = "http://127.0.0.1/a.png"
    with pytest.raises(InvalidRequest, match=r"3 images.*2"):
        start(max_images=2).run(job("write", images=[blocked] * 3), CONTEXT)


def test_as_many_images_as_the_worker_takes_are_taken(start: Start) -> None:
    assert start(max_images=2).run(job("write", images=[data_uri(png())] * 2), CONTEXT).text


def test_a_prompt_with_too_many_tokens_is_refused_with_its_cure(start: Start) -> None:
    service = start(max_prompt_tokens=10)
    assert service.run(complete("a" * 10), CONTEXT)
    with pytest.raises(PromptTooLong, match=r"11 tokens.*10.*IDEFICS_MAX_PROMPT_TOKENS"):
        service.run(complete("a" * 11), CONTEXT)


def test_labels_come_back_as_they_were_sent(service: Service) -> None:
    result = service.run(job("classify", image=data_uri(png()), labels=[" food ", "animal"]), CONTEXT)
    assert (result.text, result.label, result.scores) == (" food ", " food ", {" food ": 1.0, "animal": 0.0})


def test_the_longest_label_counts_as_part_of_the_prompt(start: Start) -> None:
    image = job("classify", image=data_uri(png()), labels=["a", "b"])
    length = start().run(image, CONTEXT).usage.prompt_tokens
    service = start(max_prompt_tokens=length + 1)
    assert service.run(image, CONTEXT)
    with pytest.raises(PromptTooLong):
        service.run(job("classify", image=data_uri(png()), labels=["a" * 200, "b"]), CONTEXT)


@pytest.mark.parametrize(
    ("image", "error"),
    [
        ("http://127.0.0.1/a.png", ImageBlocked),
        ({"path": "a.png"}, ImageBlocked),
        ("data:image/png;base64,iVBORw0KGgo=", ImageInvalid),
    ],
)
def test_an_image_that_cannot_be_had_fails_its_job(service: Service, image: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        service.run(job("caption", image=image), CONTEXT)
    with pytest.raises(error):
        service.run(job("write", images=[data_uri(png()), image]), CONTEXT)


def test_a_path_is_read_below_the_image_root(start: Start, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    result = start(image_root=tmp_path).run(job("caption", image={"path": "a.png"}), CONTEXT)
    assert result.text == start().run(job("caption", image=data_uri(png())), CONTEXT).text


def test_jobs_that_share_a_large_picture_do_not_wait_for_one_anothers_permit(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(data: bytes, *_: Any) -> Image.Image:
        time.sleep(0.1)
        return open_image(data)

    monkeypatch.setattr("worker.images.loader.open_image", slow)
    monkeypatch.setattr("worker.images.loader.LARGE_BYTES", 10)
    monkeypatch.setattr(gil, "MAX_WAIT_S", 2 * SOON)
    gil.set_permits(1)
    service = start()

    def run(number: int) -> str:
        with gil.held():
            return service.run(job("caption", image=data_uri(png()), max_new_tokens=4), JobContext(id=str(number))).text

    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(run, number) for number in range(4)]
        assert not wait(running, SOON).not_done
    assert len({each.result() for each in running}) == 1


def test_hosts_that_hang_leave_threads_to_jobs_that_load_nothing_from_the_network(start: Start) -> None:
    with ThreadPoolExecutor(6) as threads, socket.create_server(("", 0)) as silent:
        port = silent.getsockname()[1]
        service = start(image_jobs=2, image_allow_networks="127.0.0.0/8", image_ports=(port,))
        # Each at another host; the last one shows two of them, and would wait for its hosts' limits.
        urls = [f"http://127.0.0.{number}:{port}/a.png" for number in range(2, 8)]
        shown = [*([url] for url in urls[:4]), urls[4:]]
        hostile = [
            threads.submit(service.run, job("complete", prompt=[*images, "a"]), JobContext(id=str(number)))
            for number, images in enumerate(shown)
        ]
        ended = wait(hostile, 3).done
        assert [type(future.exception()) for future in ended] == [HostLimitReached] * 3
        for number in range(4):
            local = job("complete", prompt=[data_uri(png()), "door"], max_new_tokens=4)
            assert service.run(local, JobContext(id=f"local-{number}")).text == "door"
        assert sum(not future.done() for future in hostile) == 2


# Cancelling


class Meddler(FakeCodec):
    """Does something between a job's download and its row."""

    def __init__(self, meddle: Callable[[], object]) -> None:
        self._meddle = meddle

    def min_token_count(self, parts: PromptContent) -> int:
        return 0

    def prepare(self, parts: PromptContent) -> Tokens:
        self._meddle()
        return super().prepare(parts)


def meddled(meddle: Callable[[], object]) -> FakeModel:
    model = FakeModel()
    model.codec = Meddler(meddle)
    return model


def test_a_job_canceled_before_its_row_is_submitted_does_not_run(start: Start) -> None:
    model = meddled(lambda: service.cancel("job"))
    service = start(model)
    with pytest.raises(CancellationError):
        service.run(complete("a"), CONTEXT)
    assert model.batches == []


def test_a_job_canceled_while_its_image_loads_is_not_even_tokenized(start: Start) -> None:
    prepared: list[int] = []

    class Pictures(Quiet, BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            service.cancel("job")
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png())

    with serving(Pictures) as port:
        model = meddled(lambda: prepared.append(1))
        service = start(model, image_allow_networks="127.0.0.0/8", image_ports=(port,))
        with pytest.raises(CancellationError):
            service.run(job("caption", image=f"http://127.0.0.1:{port}/a.png"), CONTEXT)
    assert prepared == []


@pytest.mark.parametrize(("url", "at_once"), [(data_uri(png()), 1), ("http://a.test/{}", DOWNLOADS)])
def test_the_files_of_a_jobs_images_are_not_all_held_at_once(
    start: Start, url: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: set[int] = set()
    most: list[int] = []

    class File(bytes):
        def __init__(self, *_: object) -> None:
            held.add(id(self))
            most.append(len(held))

        def __del__(self) -> None:
            held.remove(id(self))

    monkeypatch.setattr(SourceReader, "read", lambda *_, **__: File(png()))
    result = start().run(job("write", images=[url.format(n) for n in range(32)]), CONTEXT)
    assert result.text
    assert 0 < max(most) <= at_once


def test_a_job_canceled_while_it_runs_ends_with_its_text_so_far(start: Start) -> None:
    service = start(FakeModel(step_s=0.01))
    timer = threading.Timer(0.1, service.cancel, ["job"])
    timer.start()
    with pytest.raises(CancellationError) as canceled:
        service.run(complete("a" * 60, max_new_tokens=60), CONTEXT)
    partial = canceled.value.partial
    assert partial is not None
    assert partial.finish_reason == "canceled"
    assert 0 < len(partial.text) < 60


def test_a_run_that_is_abandoned_ends_and_another_of_its_job_does_not(start: Start) -> None:
    service = start(FakeModel(step_s=0.01))
    threading.Timer(0.1, service.abandon, ["job"]).start()
    with pytest.raises(CancellationError):
        service.run(complete("a" * 60, max_new_tokens=60), CONTEXT)
    assert not service.is_canceled("job")
    assert service.run(complete("a", max_new_tokens=1), CONTEXT).text == "a"
    assert service.abandon("job") is None


def test_canceling_a_job_leaves_the_others_alone(start: Start) -> None:
    service = start(FakeModel(step_s=0.005))
    texts: list[str] = []
    other = threading.Thread(
        target=lambda: texts.append(service.run(complete("b" * 30, max_new_tokens=30), JobContext(id="other")).text)
    )
    other.start()
    threading.Timer(0.05, service.cancel, ["job"]).start()
    with pytest.raises(CancellationError):
        service.run(complete("a" * 60, max_new_tokens=60), CONTEXT)
    other.join(SOON)
    assert texts == ["b" * 30]


def test_a_job_canceled_between_its_arrival_and_its_start_does_not_run(start: Start) -> None:
    model = FakeModel()
    service = start(model)
    assert service.cancel("job") is False
    assert service.is_canceled("job")
    with pytest.raises(CancellationError):
        service.run(complete("a"), CONTEXT)
    assert model.batches == []


def test_a_canceled_job_that_is_forgotten_may_run_again(service: Service) -> None:
    service.cancel("job")
    service.forget("job")
    assert service.run(complete("a"), CONTEXT).text == "a"


def test_only_a_job_that_is_in_the_model_has_a_text_to_wait_for(start: Start) -> None:
    said: list[bool] = []
    service = start(meddled(lambda: said.append(service.cancel("job"))))
    with pytest.raises(CancellationError):
        service.run(complete("a"), CONTEXT)
    slow = start(FakeModel(step_s=0.01))
    threading.Timer(0.1, lambda: said.append(slow.cancel("job"))).start()
    with pytest.raises(CancellationError):
        slow.run(complete("a" * 60, max_new_tokens=60), CONTEXT)
    assert said == [True, False]


def test_a_canceled_job_that_fails_is_canceled_and_not_tried_again(start: Start) -> None:
    service = start(meddled(lambda: service.cancel("job") and None), max_prompt_tokens=1)
    with pytest.raises(CancellationError):
        service.run(complete("too long"), CONTEXT)


# Deadlines


def test_a_job_whose_deadline_passed_in_the_queue_fails_without_running(start: Start) -> None:
    model = FakeModel()
    context = JobContext(id="job", submitted_at=time.time() - 10)
    with pytest.raises(DeadlineExceeded):
        start(model).run(complete("a", deadline_s=9), context)
    assert model.batches == []


def test_a_deadline_counts_from_submission(service: Service) -> None:
    context = JobContext(id="job", submitted_at=time.time() - 10)
    assert service.run(complete("a", deadline_s=60), context).finish_reason == "length"


@pytest.mark.parametrize(
    ("arguments", "context"),
    [
        ({"deadline_s": 0.2}, CONTEXT),
        ({}, JobContext(id="job", soft_limit_s=0.2)),
        ({"deadline_s": 60}, JobContext(id="job", soft_limit_s=0.2)),
    ],
    ids=["deadline", "soft limit", "the earlier of both"],
)
def test_a_job_whose_time_is_up_while_it_runs_ends_with_its_text(
    start: Start, arguments: dict[str, Any], context: JobContext
) -> None:
    result = start(FakeModel(step_s=0.01)).run(complete("a" * 60, max_new_tokens=60, **arguments), context)
    assert result.finish_reason == "deadline"
    assert 0 < len(result.text) < 60


# The golden check


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
