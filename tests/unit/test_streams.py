"""The encoder's stream: the engine gets features once the device has computed them. A stand-in is the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor

from worker.engine.encoder_cache import EncoderCache, EncoderThread
from worker.engine.row import Picture
from worker.engine.streams import CudaStream


class Recorded:
    """A result that knows which streams read it."""

    def __init__(self, events: list[str]) -> None:
        self._events = events

    def record_stream(self, stream: str) -> None:
        self._events.append(f"read by {stream}")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens on a device whose stream is `own`, in order."""
    happened: list[str] = []

    class Event:
        def __init__(self, *, blocking: bool) -> None:
            assert blocking, "the thread would take a core while it waits"

        def record(self, stream: str) -> None:
            happened.append(f"mark {stream}")

        def synchronize(self) -> None:
            happened.append("wait for the mark")

    @contextlib.contextmanager
    def on(stream: str) -> Iterator[None]:
        happened.append(f"begin {stream}")
        yield
        happened.append(f"end {stream}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "own")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
    return happened


def test_results_are_complete_and_their_memory_is_kept_for_the_engines_stream(events: list[str]) -> None:
    result: Any = Recorded(events)

    def work() -> Sequence[tuple[str, Tensor]]:
        events.append("work")
        return [("picture", result)]

    assert CudaStream(torch.device("cuda"))(work) == [("picture", result)]
    assert events == ["begin own", "work", "end own", "mark own", "wait for the mark", "read by default"]


def test_a_failure_reaches_the_caller(events: list[str]) -> None:
    def work() -> Sequence[tuple[str, Tensor]]:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        CudaStream(torch.device("cuda"))(work)
    assert "wait for the mark" not in events


def test_a_row_waits_until_the_device_has_encoded_its_picture() -> None:
    launched, computed, known = Future[None](), Future[None](), Future[int]()

    def in_stream(work: Any) -> Any:
        results = work()
        launched.set_result(None)
        computed.result(5)
        return results

    cache = EncoderCache(lambda frames: torch.ones(len(frames), 2, 3), max_bytes=1_000)
    shown = Picture(b"1", torch.ones(3, 4, 4))
    EncoderThread(cache, in_stream).prefetch([shown], known.set_result)
    launched.result(5)
    assert not known.done()
    assert shown not in cache
    computed.set_result(None)
    assert known.result(5) == 0
    assert shown in cache


def test_a_device_error_while_waiting_leaves_the_picture_to_the_engine() -> None:
    known = Future[int]()

    def in_stream(work: Any) -> Any:
        work()
        raise RuntimeError("CUDA error")

    cache = EncoderCache(lambda frames: torch.ones(len(frames), 2, 3), max_bytes=1_000)
    shown = Picture(b"1", torch.ones(3, 4, 4))
    EncoderThread(cache, in_stream).prefetch([shown], known.set_result)
    assert known.result(5) == 0
    assert shown not in cache
