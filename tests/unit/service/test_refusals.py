"""Jobs that the service refuses or returns, and images that cannot be had."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tasks.errors import ImageBlocked, ImageInvalid, InvalidRequest, PromptTooLong
from tests.support.pictures import data_uri, png
from tests.unit.service.jobs import CONTEXT, SOON, Start, complete, job
from worker.images.decode import open_image
from worker.images.host_limits import HostLimitReached
from worker.jobs.runs import JobContext
from worker.jobs.service import Service
from worker.runtime import gil


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
