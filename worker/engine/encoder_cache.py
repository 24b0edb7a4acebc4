"""Image features by content: a picture that several jobs show is encoded once."""

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

#: Images that the vision tower takes at once: larger chunks are no faster and need more memory.
CHUNK = 8
#: The weight of the newest in the average of times between two pictures, and seconds that count of a pause.
NEWEST_PART, LONGEST_GAP_S = 0.1, 1.0


class FeatureCache:
    """Least-recently-used features, bounded in bytes. Safe in threads; it encodes in the caller's."""

    def __init__(self, encode: Callable[[Tensor], Tensor], max_bytes: int) -> None:
        """`encode` maps pixels (n, channels, height, width) to features (n, length, width)."""
        self._encode = encode
        self._max_bytes = max_bytes
        self._bytes = 0
        self._hits = self._misses = 0
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, picture: Picture) -> bool:
        return picture.key in self._features

    def get(self, pictures: Iterable[Picture]) -> dict[bytes, Tensor]:
        """The features (length, width) of each distinct picture, encoding those that are not kept."""
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

    def figures(self) -> dict[str, int]:
        """Images that were known, images that were encoded, and bytes kept."""
        return {"feature_hits": self._hits, "feature_misses": self._misses, "feature_bytes": self._bytes}

    @torch.inference_mode()
    def _encoded(self, pictures: Sequence[Picture]) -> dict[bytes, Tensor]:
        found: dict[bytes, Tensor] = {}
        for start in range(0, len(pictures), CHUNK):
            chunk = pictures[start : start + CHUNK]
            features = self._encode(torch.stack([picture.pixels for picture in chunk if picture.pixels is not None]))
            # Cloned: a view would keep the whole chunk alive.
            found |= {picture.key: feature.clone() for picture, feature in zip(chunk, features, strict=True)}
        return found

    def _keep(self, key: bytes, feature: Tensor) -> None:
        if key not in self._features:
            self._bytes += feature.nbytes
            self._features[key] = feature
        self._features.move_to_end(key)
        while self._bytes > self._max_bytes:
            _, dropped = self._features.popitem(last=False)
            self._bytes -= dropped.nbytes


class _Look:
    """Counts what it still waits for, and itself until all is asked for."""

    def __init__(self, pictures: int, then: Callable[[], None]) -> None:
        self._left = pictures + 1
        self._then = then
        self._lock = threading.Lock()

    def one_less(self) -> None:
        with self._lock:
            self._left -= 1
            is_over = not self._left
        if is_over:
            self._then()


class Patience:
    """How long a chunk waits for its next picture: longer than one mostly takes to come, but where that is longer than
    a chunk takes to encode, not at all. Times are those of time.monotonic()."""

    def __init__(self) -> None:
        #: What the last chunk took.
        self.encoding_s = 0.0
        self._gap_s = LONGEST_GAP_S
        self._came_at = float("-inf")

    def came(self, now: float) -> None:
        """A picture has."""
        gap_s = min(now - self._came_at, LONGEST_GAP_S)
        self._gap_s += (gap_s - self._gap_s) * NEWEST_PART
        self._came_at = now

    def left(self, begun: float, now: float) -> float:
        """Seconds from now, for a chunk whose first picture was there at `begun`."""
        if self._gap_s >= self.encoding_s:
            return 0.0
        return max(0.0, min(2 * self._gap_s, begun + self.encoding_s - now))


class Lookahead:
    """A thread that encodes pictures before their jobs' turn, while the engine's computes for others.

    On a CPU the two share its cores, and an engine with nothing to run may help (`catch_up`); on a GPU their kernels
    follow one another, and the vision tower's launches do not hold the decoder's up.
    """

    def __init__(self, cache: FeatureCache) -> None:
        self._cache = cache
        self._queue: queue.SimpleQueue[Picture] = queue.SimpleQueue()
        self._coming: dict[bytes, list[_Look]] = {}
        self._lock = threading.Lock()
        self._patience = Patience()
        #: What one of the last chunk took.
        self._picture_s = float("inf")
        threading.Thread(target=self._loop, name="encoder", daemon=True).start()

    def look(self, pictures: Sequence[Picture], then: Callable[[int], None]) -> None:
        """Call `then` once pictures are encoded, here or in the encoder's thread, with how many of them were not
        encoded for this call: known, shown twice, or encoded for another that came before."""
        missing = {picture.key: picture for picture in pictures if picture not in self._cache}
        encoded = 0
        look = _Look(len(missing), lambda: then(len(pictures) - encoded))
        for picture in missing.values():
            encoded += self._want(picture, look)
        look.one_less()

    def catch_up(self, within_s: float) -> bool:
        """Encode some of those that wait, if they are a chunk at least: half of them, and as many as take so long at
        most. Whether it did."""
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

    def _want(self, picture: Picture, look: _Look) -> bool:
        """Whether the picture is to be encoded for this look: it was not on its way already."""
        with self._lock:
            looks = self._coming.get(picture.key)
            if looks is not None:
                looks.append(look)
                return False
            self._coming[picture.key] = [look]
            self._patience.came(time.monotonic())
            self._queue.put(picture)
            return True

    def _loop(self) -> None:
        while True:
            self._encode(self._chunk())

    def _chunk(self) -> list[Picture]:
        """Pictures that have come, and those that come while it pays to wait for them."""
        chunk = [self._queue.get()]
        begun = time.monotonic()
        with contextlib.suppress(queue.Empty):
            while len(chunk) < CHUNK:
                chunk.append(self._queue.get(timeout=self._patience.left(begun, time.monotonic())))
        return chunk

    def _encode(self, chunk: Sequence[Picture]) -> None:
        started = time.monotonic()
        try:
            self._cache.get(chunk)
            self._patience.encoding_s = time.monotonic() - started
            self._picture_s = self._patience.encoding_s / len(chunk)
        except Exception:
            # The engine will need these features, try again, and knows what to do about a lack of memory.
            logger.warning("Encoding %d images ahead failed; the engine tries again.", len(chunk), exc_info=True)
        for picture in chunk:
            with self._lock:
                looks = self._coming.pop(picture.key)
            for look in looks:
                look.one_less()
