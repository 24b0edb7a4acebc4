"""A cache of image features by content, and the thread that encodes pictures before their rows run."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from worker.engine.pauses import Pauses
from worker.engine.row import Picture
from worker.engine.streams import Results, at_once
from worker.observability import metrics

logger = logging.getLogger(__name__)

#: Maximum frames encoded at once: larger chunks are not faster and need more memory.
CHUNK = 8
#: About the seconds that a chunk of several frames takes at most: so two threads can share the frames of one picture,
#: and its row is ready sooner. Frames that take long are encoded one by one as fast as together.
CHUNK_S = 0.05
#: Weight of the newest value in moving averages.
NEWEST_WEIGHT = 0.1
#: Maximum seconds between two pictures that enter the average; a longer time counts as this.
MAX_GAP_S = 1.0

#: Calls a function and returns its results once the device has computed them: see streams.CudaStream.
InStream = Callable[[Callable[[], Results[Picture]]], Results[Picture]]


class EncoderCache:
    """An LRU cache of features, bounded in bytes. Thread-safe; encodes in the caller's thread."""

    def __init__(self, encode: Callable[[Sequence[Any]], Sequence[Tensor]], max_bytes: int, chunk: int = CHUNK) -> None:
        """`encode` returns the features of each of up to `chunk` frames (see Picture.frames), in any shape; those of a
        picture's frames are concatenated in the first dimension."""
        self._encode = encode
        self._max_bytes = max_bytes
        self.chunk = chunk
        self._bytes = 0
        self._hits = self._misses = 0
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, picture: Picture) -> bool:
        return picture.key in self._features

    def get(self, pictures: Iterable[Picture]) -> Pauses[dict[bytes, Tensor]]:
        """The features of each distinct picture by its key, in the shape of `encode`. Encodes those not cached, with a
        pause after each chunk."""
        wanted = {picture.key: picture for picture in pictures}
        with self._lock:
            found = {key: self._features[key] for key in wanted if key in self._features}
            self._hits += len(found)
            for key in found:
                self._features.move_to_end(key)
        encoded = yield from self._encoded([picture for key, picture in wanted.items() if key not in found])
        for key, feature in encoded.items():
            self.keep(key, feature)
        return found | encoded

    def metrics(self) -> dict[str, int]:
        """Cache hits, cache misses, and bytes of the cached features."""
        return {"feature_hits": self._hits, "feature_misses": self._misses, "feature_bytes": self._bytes}

    def _encoded(self, pictures: Sequence[Picture]) -> Pauses[dict[bytes, Tensor]]:
        """Encode pictures in chunks of frames. Returns their features by key, in the shape of `encode`."""
        frames = [(picture.key, frame) for picture in pictures for frame in picture.frames]
        features: dict[bytes, list[Tensor]] = {picture.key: [] for picture in pictures}
        for start in range(0, len(frames), self.chunk):
            keys, chunk = zip(*frames[start : start + self.chunk], strict=True)
            began = time.monotonic()
            for key, feature in zip(keys, self.encode(chunk), strict=True):
                features[key].append(feature)
            metrics.PHASES["encode"].inc(time.monotonic() - began)
            yield
        return {key: joined(each) for key, each in features.items()}

    @torch.inference_mode()
    def encode(self, frames: Sequence[Any]) -> Sequence[Tensor]:
        """The features of each frame, in any shape."""
        return self._encode(frames)

    def keep(self, key: bytes, feature: Tensor) -> None:
        """Cache the features (any shape) of a picture that was encoded, and drop those used least recently."""
        with self._lock:
            self._misses += 1
            if key not in self._features:
                self._bytes += feature.nbytes
                self._features[key] = feature
            self._features.move_to_end(key)
            while self._bytes > self._max_bytes:
                _, dropped = self._features.popitem(last=False)
                self._bytes -= dropped.nbytes
            metrics.ENCODER_CACHE_BYTES.set(self._bytes)


@torch.inference_mode()
def joined(features: Sequence[Tensor]) -> Tensor:
    """The features of a picture's frames (tokens, ...) as one tensor (all tokens, ...). It is a copy, since a view
    would keep whole chunks in memory."""
    return torch.cat(list(features))


class CountdownLatch:
    """Calls `then` when `count_down` has been called `count` times. Thread-safe."""

    def __init__(self, count: int, then: Callable[[], None]) -> None:
        self._left = count
        self._then = then
        self._lock = threading.Lock()

    def count_down(self) -> None:
        """Count one call; the last one calls `then`."""
        with self._lock:
            self._left -= 1
            is_last = not self._left
        if is_last:
            self._then()


class AdaptiveBatchWindow:
    """How long a chunk waits for its next picture: twice the mean time between two pictures, or 0 if that mean is
    longer than a chunk takes to encode. Times are time.monotonic(), in seconds."""

    def __init__(self) -> None:
        self._encoding_s = 0.0
        self._gap_s = MAX_GAP_S
        self._arrived_at = float("-inf")

    def record_arrival(self, now: float) -> None:
        """Record the arrival of a picture at `now`; updates the mean time between two pictures."""
        gap_s = min(now - self._arrived_at, MAX_GAP_S)
        self._gap_s += (gap_s - self._gap_s) * NEWEST_WEIGHT
        self._arrived_at = now

    def record_encoding(self, taken_s: float) -> None:
        """Record the time that a chunk took to encode. The longest recent one counts: after a chunk of one picture,
        which is encoded before the next one arrives, no chunk would wait any more."""
        self._encoding_s = max(taken_s, (1 - NEWEST_WEIGHT) * self._encoding_s)

    def wait_s(self, begun: float, now: float) -> float:
        """Seconds from `now` that a chunk waits for its next picture. `begun`: when it got its first picture."""
        if self._gap_s >= self._encoding_s:
            return 0.0
        return max(0.0, min(2 * self._gap_s, begun + self._encoding_s - now))


class EncoderThread:
    """A thread that encodes pictures before their rows run, while the engine thread decodes other rows.

    On a CPU the two threads share the cores, and an engine that waits for rows may help. On a GPU the encoder has a
    stream of its own: no decode step waits for a chunk, and a row enters the engine only when its features are
    complete.
    """

    def __init__(self, cache: EncoderCache, in_stream: InStream = at_once) -> None:
        """`in_stream`: calls a function that encodes, and returns its result once the device has computed it."""
        self._cache = cache
        self._in_stream = in_stream
        #: Frames by their pictures and numbers.
        self._queue: queue.SimpleQueue[tuple[Picture, int]] = queue.SimpleQueue()
        #: By key.
        self._waiting: dict[bytes, _WaitingPicture] = {}
        self._lock = threading.Lock()
        self._window = AdaptiveBatchWindow()
        #: Seconds for each frame, the shortest of the last chunks: other threads may have delayed the others.
        self._frame_s = float("inf")
        threading.Thread(target=self._loop, name="encoder", daemon=True).start()

    def prefetch(self, pictures: Sequence[Picture], then: Callable[[int], None]) -> None:
        """Encode pictures, then call `then` with the number of pictures that were not encoded for this call.

        A picture is not encoded if it is cached, occurs twice, or is being encoded for an earlier call. `then` is
        called in the caller's thread if all pictures are cached, otherwise in the thread that encodes the last one.
        """
        missing = {picture.key: picture for picture in pictures if picture not in self._cache}
        encoded = 0
        # One more than the pictures, for the loop itself, since `then` needs the final count.
        latch = CountdownLatch(len(missing) + 1, lambda: then(len(pictures) - encoded))
        for picture in missing.values():
            encoded += self._enqueue(picture, latch)
        latch.count_down()
        metrics.ENCODER_CACHE.queries.inc(len(pictures))
        metrics.ENCODER_CACHE.hits.inc(len(pictures) - encoded)

    def help(self, within_s: float) -> bool:
        """If a chunk or more waits, encode up to half of the waiting frames for about `within_s` seconds, one at least.

        Returns False if nothing was encoded.
        """
        waiting, chunk_frames = self._queue.qsize(), self._frames_within(CHUNK_S)
        count = min(waiting // 2, self._frames_within(within_s))
        if waiting < chunk_frames or count < 1:
            return False
        chunk: list[tuple[Picture, int]] = []
        with contextlib.suppress(queue.Empty):
            while len(chunk) < count:
                chunk.append(self._queue.get_nowait())
        self._encode(chunk)
        return bool(chunk)

    def _enqueue(self, picture: Picture, latch: CountdownLatch) -> bool:
        """Queue a picture; count the latch down once it is encoded. Returns False if it was queued already."""
        with self._lock:
            waiting = self._waiting.get(picture.key)
            if waiting is not None:
                waiting.latches.append(latch)
                return False
            self._waiting[picture.key] = _WaitingPicture([latch])
            self._window.record_arrival(time.monotonic())
            for number in range(len(picture.frames)):
                self._queue.put((picture, number))
            return True

    def _loop(self) -> None:
        while True:
            self._encode(self._chunk())

    def _chunk(self) -> list[tuple[Picture, int]]:
        """The waiting frames, and those that arrive within the batch window."""
        chunk = [self._queue.get()]
        begun = time.monotonic()
        with contextlib.suppress(queue.Empty):
            while len(chunk) < self._frames_within(CHUNK_S):
                chunk.append(self._queue.get(timeout=self._window.wait_s(begun, time.monotonic())))
        return chunk

    def _frames_within(self, seconds: float) -> int:
        """Number of frames that are encoded within some time: one at least, and no more than a chunk may have."""
        return min(self._cache.chunk, max(1, int(seconds / self._frame_s)))

    def _encode(self, chunk: Sequence[tuple[Picture, int]]) -> None:
        # The other frames of a picture that failed are not needed.
        chunk = [(picture, number) for picture, number in chunk if picture.key in self._waiting]
        started = time.monotonic()
        try:
            encoded = self._in_stream(lambda: self._encoded(chunk)) if chunk else []
        except Exception:
            # The engine encodes them again when it needs them, and handles a lack of memory.
            logger.warning("Encoding %d images ahead failed; the engine tries again.", len(chunk), exc_info=True)
            for picture, _ in chunk:
                self._finish(picture)
            return
        encoding_s = time.monotonic() - started
        self._window.record_encoding(encoding_s)
        metrics.PHASES["encode"].inc(encoding_s)
        if chunk:
            self._frame_s = min(encoding_s / len(chunk), (1 + NEWEST_WEIGHT) * self._frame_s)
        for picture, features in encoded:
            self._cache.keep(picture.key, features)
            self._finish(picture)

    def _encoded(self, chunk: Sequence[tuple[Picture, int]]) -> list[tuple[Picture, Tensor]]:
        """Encode frames, and return the pictures of which no other frame is missing, with their features (any
        shape)."""
        features = self._cache.encode([picture.frames[number] for picture, number in chunk])
        complete: list[tuple[Picture, Tensor]] = []
        for (picture, number), feature in zip(chunk, features, strict=True):
            frames = self._collect(picture, number, feature)
            if frames:
                complete.append((picture, joined(frames)))
        return complete

    def _collect(self, picture: Picture, number: int, feature: Tensor) -> Sequence[Tensor]:
        """Store a frame's features (any shape). With the last frame, return those of all frames in order."""
        with self._lock:
            waiting = self._waiting.get(picture.key)
            if waiting is None:
                return ()
            waiting.features[number] = feature
            if len(waiting.features) < len(picture.frames):
                return ()
        return [feature for _, feature in sorted(waiting.features.items())]

    def _finish(self, picture: Picture) -> None:
        """Count down the latches that wait for a picture, if any."""
        with self._lock:
            waiting = self._waiting.pop(picture.key, None)
        for latch in waiting.latches if waiting else ():
            latch.count_down()


@dataclass
class _WaitingPicture:
    """A picture that waits or is being encoded."""

    latches: list[CountdownLatch]
    #: By number of the frame, in any shape.
    features: dict[int, Tensor] = field(default_factory=dict)
