"""The cache of image features: what is encoded, what is kept, and how much."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from worker.engine.encoder_cache import CHUNK, CHUNK_S, AdaptiveBatchWindow, EncoderCache, EncoderThread
from worker.engine.pauses import without_pauses
from worker.engine.row import Picture

#: Bytes of one picture's features here: 2 x 3 float32.
BYTES = 24


class Encoder:
    """Features (2, 3) that hold the picture's own number."""

    def __init__(self) -> None:
        self.chunks: list[int] = []

    def __call__(self, pictures: Sequence[Picture]) -> Tensor:
        self.chunks.append(len(pictures))
        pixels = torch.stack([picture.pixels for picture in pictures if picture.pixels is not None])
        return pixels[:, :1, :2, :1].reshape(-1, 2, 1).expand(-1, 2, 3) * 1.0

    @property
    def encoded(self) -> int:
        return sum(self.chunks)


def picture(number: int) -> Picture:
    return Picture(str(number).encode(), torch.full((3, 4, 4), float(number)))


def cache(encoder: Encoder, pictures: int = 1_000) -> EncoderCache:
    return EncoderCache(encoder, max_bytes=pictures * BYTES)


def got(cache: EncoderCache, pictures: Iterable[Picture]) -> dict[bytes, Tensor]:
    return without_pauses(cache.get(pictures))


def test_each_picture_gets_its_own_features() -> None:
    found = got(cache(Encoder()), map(picture, range(20)))
    assert {int(key): feature.unique().tolist() for key, feature in found.items()} == {n: [n] for n in range(20)}
    assert all(feature.shape == (2, 3) for feature in found.values())


def test_a_picture_that_several_rows_show_is_encoded_once() -> None:
    encoder = Encoder()
    assert len(got(cache(encoder), [picture(1), picture(2), picture(1)])) == 2
    assert encoder.encoded == 2


def test_a_picture_seen_earlier_is_not_encoded_again() -> None:
    encoder = Encoder()
    features = cache(encoder)
    first = got(features, [picture(1)])
    assert picture(1) in features
    assert picture(2) not in features
    again = got(features, [picture(1), picture(2)])
    assert encoder.encoded == 2
    assert torch.equal(again[b"1"], first[b"1"])


def test_no_pictures_need_no_encoder() -> None:
    encoder = Encoder()
    assert got(cache(encoder), []) == {}
    assert encoder.chunks == []


def test_pictures_are_encoded_in_chunks() -> None:
    encoder = Encoder()
    got(cache(encoder), map(picture, range(2 * CHUNK + 3)))
    assert encoder.chunks == [CHUNK, CHUNK, 3]


def test_kept_features_do_not_keep_their_chunk_alive() -> None:
    found = got(cache(Encoder()), map(picture, range(CHUNK)))
    assert all(feature.untyped_storage().nbytes() == BYTES for feature in found.values())


def test_the_features_kept_are_bounded_in_bytes() -> None:
    features = cache(Encoder(), pictures=3)
    got(features, map(picture, range(10)))
    assert sum(picture(number) in features for number in range(10)) == 3


def test_the_least_recently_used_goes_first() -> None:
    features = cache(Encoder(), pictures=2)
    got(features, [picture(1)])
    got(features, [picture(2)])
    got(features, [picture(1)])
    got(features, [picture(3)])
    assert picture(1) in features
    assert picture(2) not in features
    assert picture(3) in features


def test_more_pictures_than_are_kept_still_all_have_features() -> None:
    assert len(got(cache(Encoder(), pictures=2), map(picture, range(10)))) == 10


def test_a_picture_larger_than_the_cache_is_encoded_each_time() -> None:
    encoder = Encoder()
    features = cache(encoder, pictures=0)
    for _ in range(2):
        assert got(features, [picture(1)])[b"1"].unique().tolist() == [1]
    assert encoder.encoded == 2


def test_a_picture_that_comes_back_counts_once() -> None:
    features = cache(Encoder(), pictures=2)
    for _ in range(10):
        got(features, [picture(1)])
    got(features, [picture(2)])
    assert picture(1) in features


def prefetcher(encoder_thread: EncoderThread) -> Callable[[Sequence[Picture]], int]:
    """Its `prefetch`, waiting for the answer."""

    def prefetch(pictures: Sequence[Picture]) -> int:
        known: Future[int] = Future()
        encoder_thread.prefetch(pictures, known.set_result)
        return known.result(5)

    return prefetch


def test_jobs_that_look_at_one_picture_at_once_have_it_encoded_once() -> None:
    gate, encoder = threading.Event(), Encoder()

    def slow(pictures: Sequence[Picture]) -> Tensor:
        gate.wait(5)
        return encoder(pictures)

    features = EncoderCache(slow, max_bytes=1_000)
    prefetch = prefetcher(EncoderThread(features))
    with ThreadPoolExecutor(8) as pool:
        looks = [pool.submit(prefetch, [picture(1), picture(2)]) for _ in range(8)]
        gate.set()
        # Two pictures were encoded for one of the eight, or one for each of two.
        assert 8 * 2 - sum(each.result(5) for each in looks) == 2
    assert encoder.encoded == 2
    assert prefetch([picture(1), picture(3)]) == 1


def test_a_picture_that_is_shown_twice_counts_as_encoded_once() -> None:
    prefetch = prefetcher(EncoderThread(EncoderCache(Encoder(), max_bytes=1_000)))
    assert prefetch([picture(1), picture(2), picture(1)]) == 1
    assert prefetch([picture(1), picture(1), picture(3)]) == 2


def test_pictures_that_wait_together_are_encoded_together() -> None:
    gate, encoder = threading.Event(), Encoder()

    def slow(pictures: Sequence[Picture]) -> Tensor:
        gate.wait(5)
        return encoder(pictures)

    prefetch = prefetcher(EncoderThread(EncoderCache(slow, max_bytes=1_000)))
    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(prefetch, [picture(number) for number in range(1 + CHUNK)])
        gate.set()
        looking.result(5)
    assert len(encoder.chunks) <= 3


class Held(Encoder):
    """Encodes one picture, then in its own thread nothing until it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.opened, self.entered = threading.Event(), threading.Event()

    def __call__(self, pictures: Sequence[Picture]) -> Tensor:
        if self.chunks and threading.current_thread().name == "encoder":
            self.entered.set()
            assert self.opened.wait(5)
        return super().__call__(pictures)


@pytest.mark.parametrize(
    ("waiting", "within_s", "chunks"), [(CHUNK, 60, [CHUNK // 2]), (CHUNK - 1, 60, []), (20, 0, [1])]
)
def test_another_thread_takes_half_of_the_pictures_that_wait(waiting: int, within_s: float, chunks: list[int]) -> None:
    encoder = Held()
    encoder_thread = EncoderThread(EncoderCache(encoder, max_bytes=1_000))
    prefetcher(encoder_thread)([picture(0)])
    known = [Future[int]() for _ in range(1 + waiting)]
    encoder_thread.prefetch([picture(1)], known[0].set_result)
    assert encoder.entered.wait(5)
    for number, each in enumerate(known[1:]):
        encoder_thread.prefetch([picture(2 + number)], each.set_result)
    assert encoder_thread.help(within_s) == bool(chunks)
    assert encoder.chunks == [1, *chunks]
    assert sum(each.done() for each in known) == sum(chunks)
    encoder.opened.set()
    assert [each.result(5) for each in known] == [0] * len(known)
    assert encoder.encoded == len(known) + 1


def came(window: AdaptiveBatchWindow, pictures: int, gap_s: float) -> float:
    """The time at which the last of them comes."""
    for number in range(pictures):
        window.record_arrival(number * gap_s)
    return (pictures - 1) * gap_s


def test_a_chunk_waits_for_pictures_that_come_fast() -> None:
    window = AdaptiveBatchWindow()
    window.record_encoding(0.03)
    now = came(window, 100, gap_s=0.005)
    assert window.wait_s(now, now) == pytest.approx(0.01, rel=0.1)
    # But not longer than it takes to encode it.
    assert window.wait_s(now - 0.025, now) == pytest.approx(0.005)
    assert window.wait_s(now - 0.04, now) == 0


def test_a_chunk_does_not_wait_where_pictures_come_seldom() -> None:
    window = AdaptiveBatchWindow()
    assert window.wait_s(0, 0) == 0
    window.record_encoding(0.03)
    came(window, 100, gap_s=0.04)
    assert window.wait_s(4, 4) == 0
    # Nor for what comes after a pause.
    window.record_arrival(100)
    assert window.wait_s(100, 100) == 0


def test_chunks_wait_on_after_a_few_of_one_picture() -> None:
    window = AdaptiveBatchWindow()
    now = came(window, 100, gap_s=0.005)
    window.record_encoding(0.03)
    waited = []
    for _ in range(50):
        window.record_encoding(0.003)
        waited.append(window.wait_s(now, now) > 0)
    assert waited[:10] == [True] * 10
    assert not waited[-1]


class Cut(Picture):
    """A picture that is cut into as many frames as its number says."""

    @property
    def frames(self) -> Sequence[Picture]:
        return [picture(100 * int(self.key) + number) for number in range(int(self.key))]


def cut(frames: int) -> Picture:
    return Cut(str(frames).encode(), None)


def numbers(feature: Tensor) -> list[float]:
    """Those of the frames, in order."""
    return feature[::2, 0].tolist()


def test_the_frames_of_pictures_are_encoded_in_chunks_with_a_pause_after_each() -> None:
    encoder = Encoder()
    features = EncoderCache(encoder, max_bytes=1_000, chunk=4)
    work = features.get([cut(5), cut(6)])
    for chunks in ([4], [4, 4], [4, 4, 3]):
        next(work)
        assert encoder.chunks == chunks
    assert {key: numbers(feature) for key, feature in without_pauses(work).items()} == {
        b"5": [500, 501, 502, 503, 504],
        b"6": [600, 601, 602, 603, 604, 605],
    }
    assert features.metrics() == {"feature_hits": 0, "feature_misses": 2, "feature_bytes": 11 * BYTES}


def test_two_threads_share_the_frames_of_a_picture() -> None:
    encoder = Held()
    features = EncoderCache(encoder, max_bytes=10_000, chunk=4)
    encoder_thread = EncoderThread(features)
    prefetcher(encoder_thread)([picture(0)])
    known = Future[int]()
    encoder_thread.prefetch([cut(20)], known.set_result)
    assert encoder.entered.wait(5)
    assert encoder_thread.help(60)
    assert encoder.chunks == [1, 4]
    assert not known.done()
    encoder.opened.set()
    assert known.result(5) == 0
    assert numbers(got(features, [cut(20)])[b"20"]) == [2_000 + number for number in range(20)]
    assert encoder.encoded == 21


class Slow(Held):
    """Takes CHUNK_S for each frame."""

    def __call__(self, pictures: Sequence[Picture]) -> Tensor:
        time.sleep(CHUNK_S * len(pictures))
        return super().__call__(pictures)


def test_two_threads_share_a_picture_of_few_frames_that_take_long() -> None:
    encoder = Slow()
    encoder_thread = EncoderThread(EncoderCache(encoder, max_bytes=10_000))
    prefetcher(encoder_thread)([picture(0)])
    known = Future[int]()
    encoder_thread.prefetch([cut(5)], known.set_result)
    assert encoder.entered.wait(5)
    while encoder_thread.help(CHUNK_S):
        pass
    assert encoder.chunks == [1, 1, 1, 1]
    encoder.opened.set()
    assert known.result(5) == 0
    assert encoder.chunks == [1] * 6


def test_a_picture_with_a_frame_that_cannot_be_encoded_ahead_is_left_to_the_engine() -> None:
    encoder = Encoder()

    def broken(pictures: Sequence[Picture]) -> Tensor:
        if any(int(each.key) == 602 for each in pictures):
            raise RuntimeError("no memory")
        return encoder(pictures)

    features = EncoderCache(broken, max_bytes=1_000, chunk=1)
    prefetch = prefetcher(EncoderThread(features))
    assert prefetch([cut(6)]) == 0
    assert prefetch([cut(3)]) == 0
    assert cut(6) not in features
    assert numbers(got(features, [cut(3)])[b"3"]) == [300, 301, 302]
    # Those behind the broken frame are not needed.
    assert encoder.encoded == 2 + 3


def test_what_cannot_be_encoded_ahead_is_left_to_the_engine() -> None:
    def broken(pictures: Sequence[Picture]) -> Tensor:
        raise RuntimeError("no memory")

    features = EncoderCache(broken, max_bytes=1_000)
    prefetch = prefetcher(EncoderThread(features))
    assert prefetch([picture(1)]) == 0
    assert prefetch([picture(1)]) == 0
    assert picture(1) not in features
