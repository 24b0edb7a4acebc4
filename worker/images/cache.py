"""A cache of pictures by the content of their files, so that a picture of several jobs is decoded once."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

from worker.engine.row import Picture
from worker.observability.metrics import PICTURE_CACHE, PICTURE_CACHE_BYTES


class PictureCache:
    """An LRU cache of pictures. Thread-safe: one thread makes a picture, and others wait for it."""

    def __init__(self, make: Callable[[bytes], Picture], max_bytes: int) -> None:
        """`make` decodes and normalises a file's bytes; its errors reach the caller. `max_bytes`: of all pixels."""
        self._make = make
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: OrderedDict[bytes, Future[Picture]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, data: bytes) -> Picture:
        """The picture of a file's bytes, made if it is not cached. Raises what `make` raises."""
        key = hashlib.blake2b(data, digest_size=16).digest()
        with self._lock:
            known = self._kept.get(key)
            if known is None:
                mine: Future[Picture] = Future()
                self._kept[key] = mine
            else:
                self._kept.move_to_end(key)
        PICTURE_CACHE.queries.inc()
        if known is None:
            return self._made(key, data, mine)
        PICTURE_CACHE.hits.inc()
        # A failed decoding is repeated: each job needs its own exception object, since Celery clears tracebacks.
        return self._make(data) if known.exception() else known.result()

    def _made(self, key: bytes, data: bytes, mine: Future[Picture]) -> Picture:
        try:
            picture = self._make(data)
        except BaseException as error:
            with self._lock:
                self._kept.pop(key, None)
            mine.set_exception(error)
            raise
        mine.set_result(picture)
        self._shrink(picture.nbytes)
        return picture

    def _shrink(self, added: int) -> None:
        with self._lock:
            self._bytes += added
            while self._bytes > self._max_bytes:
                # Unfinished pictures are not in the sum, so there is always a finished one to evict.
                oldest = next(key for key, future in self._kept.items() if future.done())
                self._bytes -= self._kept.pop(oldest).result().nbytes
            PICTURE_CACHE_BYTES.set(self._bytes)
