"""A cache of image features by content, and the thread that encodes pictures before their rows run."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from worker.engine.row import Picture

logger = logging.getLogger(__name__)

#: Maximum pictures encoded at once: larger chunks are not faster and need more memory.
CHUNK = 8
#: Weight of the newest value in the moving average of the time between two pictures.
NEWEST_WEIGHT = 0.1
#: Maximum seconds between two pictures that enter the average; a longer time counts as this.
MAX_GAP_S = 1.0


class EncoderCache:
    """An LRU cache of features, bounded in bytes. Thread-safe; encodes in the caller's thread."""

    def __init__(self, encode: Callable[[Sequence[Picture]], Sequence[Tensor]], max_bytes: int) -> None:
        """`encode` returns the features of each of up to CHUNK pictures, in any shape."""
        self._encode = encode
        self._max_bytes = max_bytes
        self._bytes = 0
        self._hits = self._misses = 0
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, picture: Picture) -> bool:
        return picture.key in self._features

    def get(self, pictures: Iterable[Picture]) -> dict[bytes, Tensor]:
        """The features of each distinct picture by its key, in the shape of `encode`. Encodes those not cached."""
        wanted = {picture.key: picture for picture in pictures}
        with self._lock:
            found = {key: self._features[key] for key in wanted if key in self._features}
            self._hits += len(found)
            self._misses += len(wanted) - len(found)
        found |= self._encoded([picture for key, picture in wanted.items() if key not in found])
        with self._lock:
            for key in wanted:
                self._keep(key, found[key])
        return found

    def metrics(self) -> dict[str, int]:
        """Cache hits, cache misses, and bytes of the cached features."""
        return {"feature_hits": self._hits, "feature_misses": self._misses, "feature_bytes": self._bytes}

    @torch.inference_mode()
    def _encoded(self, pictures: Sequence[Picture]) -> dict[bytes, Tensor]:
        """Encode pictures in chunks. Returns their features by key, in the shape of `encode`."""
        found: dict[bytes, Tensor] = {}
        for start in range(0, len(pictures), CHUNK):
            chunk = pictures[start : start + CHUNK]
            # Cloned, since a view would keep the whole chunk in memory.
            found |= {picture.key: feature.clone() for picture, feature in zip(chunk, self._encode(chunk), strict=True)}
        return found

    def _keep(self, key: bytes, feature: Tensor) -> None:
        if key not in self._features:
            self._bytes += feature.nbytes
            self._features[key] = feature
        self._features.move_to_end(key)
        while self._bytes > self._max_bytes:
            _, dropped = self._features.popitem(last=False)
            self._bytes -= dropped.nbytes


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
        #: Seconds that the last chunk took to encode.
        self.encoding_s = 0.0
        self._gap_s = MAX_GAP_S
        self._arrived_at = float("-inf")

    def record_arrival(self, now: float) -> None:
        """Record the arrival of a picture at `now`; updates the mean time between two pictures."""
        gap_s = min(now - self._arrived_at, MAX_GAP_S)
        self._gap_s += (gap_s - self._gap_s) * NEWEST_WEIGHT
        self._arrived_at = now

    def wait_s(self, begun: float, now: float) -> float:
        """Seconds from `now` that a chunk waits for its next picture. `begun`: when it got its first picture."""
        if self._gap_s >= self.encoding_s:
            return 0.0
        return max(0.0, min(2 * self._gap_s, begun + self.encoding_s - now))


class EncoderThread:
    """A thread that encodes pictures before their rows run, while the engine thread decodes other rows.

    On a CPU the two threads share the cores, and an engine without rows may help. On a GPU their kernels alternate, and
    launching the encoder's kernels does not delay the decoder.
    """

    def __init__(self, cache: EncoderCache) -> None:
        self._cache = cache
        self._queue: queue.SimpleQueue[Picture] = queue.SimpleQueue()
        #: By key of each picture that waits or is being encoded: the latches that wait for it.
        self._latches: dict[bytes, list[CountdownLatch]] = {}
        self._lock = threading.Lock()
        self._window = AdaptiveBatchWindow()
        #: Seconds for each picture of the last chunk.
        self._picture_s = float("inf")
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

    def help(self, within_s: float) -> bool:
        """If a chunk or more waits, encode up to half of the waiting pictures for about `within_s` seconds.

        Returns False if nothing was encoded.
        """
        waiting = self._queue.qsize()
        count = min(CHUNK, waiting // 2, int(within_s / self._picture_s))
        if waiting < CHUNK or count < 1:
            return False
        chunk: list[Picture] = []
        with contextlib.suppress(queue.Empty):
            while len(chunk) < count:
                chunk.append(self._queue.get_nowait())
        self._encode(chunk)
        return bool(chunk)

    def _enqueue(self, picture: Picture, latch: CountdownLatch) -> bool:
        """Queue a picture; count the latch down once it is encoded. Returns False if it was queued already."""
        with self._lock:
            latches = self._latches.get(picture.key)
            if latches is not None:
                latches.append(latch)
                return False
            self._latches[picture.key] = [latch]
            self._window.record_arrival(time.monotonic())
            self._queue.put(picture)
            return True

    def _loop(self) -> None:
        while True:
            self._encode(self._chunk())

    def _chunk(self) -> list[Picture]:
        """The waiting pictures, and those that arrive within the batch window."""
        chunk = [self._queue.get()]
        begun = time.monotonic()
        with contextlib.suppress(queue.Empty):
            while len(chunk) < CHUNK:
                chunk.append(self._queue.get(timeout=self._window.wait_s(begun, time.monotonic())))
        return chunk

    def _encode(self, chunk: Sequence[Picture]) -> None:
        started = time.monotonic()
        try:
            self._cache.get(chunk)
            self._window.encoding_s = time.monotonic() - started
            self._picture_s = self._window.encoding_s / len(chunk)
        except Exception:
            # The engine encodes them again when it needs them, and handles a lack of memory.
            logger.warning("Encoding %d images ahead failed; the engine tries again.", len(chunk), exc_info=True)
        for picture in chunk:
            with self._lock:
                latches = self._latches.pop(picture.key)
            for latch in latches:
                latch.count_down()
