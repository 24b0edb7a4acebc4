"""Loads a job's pictures: reads them from their sources, decodes them, and caches them for other jobs."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from contextvars import copy_context
from functools import partial
from typing import NamedTuple

from PIL.Image import Image

from config.settings import Settings
from tasks.payload_fields import CheckedImage
from worker.engine.row import Picture
from worker.images.cache import PictureCache
from worker.images.copies import PictureCopies, small_copy
from worker.images.decode import ImageLimits, open_image
from worker.images.download_limits import NETWORK, DownloadLimits
from worker.images.fetch import FetchPolicy
from worker.images.sources import SourceReader, is_remote
from worker.observability import tracing
from worker.observability.metrics import STAGES
from worker.runtime import gil
from worker.runtime.cpu import all_cores, on_decoding_cores

#: Simultaneous downloads for a job with several images. They run in threads of that job only, so that slow hosts of
#: other jobs do not delay them.
DOWNLOADS = 4
#: A thread that decodes a file of more bytes releases its GIL permit meanwhile, and uses any core: other threads would
#: wait too long.
LARGE_BYTES = 40_000


#: Is given a picture's file once it was decoded.
Keep = Callable[[bytes], None]


class _Decoded(NamedTuple):
    """A picture, and the seconds that its decoding took or that it was waited for."""

    picture: Picture
    seconds: float


class ImageLoader:
    """Loads the pictures of jobs. Thread-safe."""

    def __init__(
        self,
        settings: Settings,
        preprocess: Callable[[Image], Picture],
        expecting: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        downloads: DownloadLimits | None = None,
    ) -> None:
        """`preprocess` scales a decoded RGB image for the model. `expecting` is entered while a large file is decoded:
        see RowQueue. `downloads`: by default limits that are not shared, and no parked jobs."""
        self._preprocess = preprocess
        self._expecting = expecting
        self._limits = ImageLimits(max_pixels=settings.image_max_pixels)
        downloads = downloads or DownloadLimits(settings)
        self._network = downloads.network
        self._sources = SourceReader(fetch_policy(settings), downloads.hosts)
        self._max_wait_s = settings.image_timeout_s
        self._cache = PictureCache(self.open, settings.image_cache_bytes)
        # More decoders than cores would only compete for the GIL.
        self._decoders = threading.Semaphore(len(all_cores()))

    @property
    def jobs_on_network(self) -> int:
        """Number of jobs that load from the network, or wait to."""
        return self._network.in_use

    def load(self, sources: Sequence[CheckedImage], copies: PictureCopies | None = None) -> list[Picture]:
        """A job's pictures, in order. Their files are kept for `copies`. Raises a JobError, or HostLimitReached."""
        if not sources:
            return []
        started = time.monotonic()
        may_park = not any(map(_is_inline, sources))
        keepers = [partial(copies.keep, number) if copies else _keep_nothing for number in range(len(sources))]
        if sum(map(is_remote, sources)) < 2:
            decoded = [self._load(source, keep, may_park) for source, keep in zip(sources, keepers, strict=True)]
        else:
            with gil.released(), self._network.acquire(NETWORK, may_park=may_park):
                decoded = self._load_at_once(sources, keepers)
        _observe(time.monotonic() - started, sum(each.seconds for each in decoded))
        return [each.picture for each in decoded]

    def open(self, data: bytes) -> Picture:
        """Decode and preprocess a file, without the cache. Raises a JobError."""
        cores = on_decoding_cores() if len(data) > LARGE_BYTES else contextlib.nullcontext()
        with self._decoders, cores, tracing.stage("decode"):
            return self._preprocess(open_image(data, self._limits))

    def copy(self, data: bytes) -> bytes:
        """A file as a small JPEG. Raises a JobError for one that cannot be opened."""
        with gil.released(), self._decoders:
            return small_copy(data, self._limits)

    def _load(self, source: CheckedImage, keep: Keep, may_park: bool) -> _Decoded:
        if not is_remote(source):
            return self._decoded(self._sources.read(source), keep)
        with gil.released(), self._network.acquire(NETWORK, may_park=may_park):
            data = self._sources.read(source, may_park=may_park)
        return self._decoded(data, keep)

    def _load_at_once(self, sources: Sequence[CheckedImage], keepers: Sequence[Keep]) -> list[_Decoded]:
        threads = ThreadPoolExecutor(min(DOWNLOADS, len(sources)), thread_name_prefix="download")
        try:
            # Each thread has a copy of this one's context: its log records and stages are the job's.
            loads = [
                threads.submit(copy_context().run, self._load_in_thread, source, keep)
                for source, keep in zip(sources, keepers, strict=True)
            ]
            return [load.result() for load in loads]
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def _load_in_thread(self, source: CheckedImage, keep: Keep) -> _Decoded:
        # A long wait for the host, since a job that is sent back loses the images that it has loaded.
        data = self._sources.read(source, wait_s=self._max_wait_s)
        # Decoded without waiting for the other files, which take much more memory than the decoded pictures.
        with gil.held():
            return self._decoded(data, keep)

    def _decoded(self, data: bytes, keep: Keep) -> _Decoded:
        started = time.monotonic()
        picture = self._picture(data)
        keep(data)
        return _Decoded(picture, time.monotonic() - started)

    def _picture(self, data: bytes) -> Picture:
        # Around the whole call: otherwise a thread that holds a permit could wait for a decoder, or for this picture.
        if len(data) <= LARGE_BYTES:
            return self._cache.get(data)
        with gil.released(), self._expecting():
            return self._cache.get(data)


def _keep_nothing(data: bytes) -> None:
    pass


def _is_inline(source: CheckedImage) -> bool:
    """True for bytes in the job's message, which takes too much memory to wait in numbers."""
    return isinstance(source, str) and not is_remote(source)


def _observe(seconds: float, decoding_s: float) -> None:
    """Observe the stages of a job's images. Several may be decoded at the same time."""
    decode_s = min(seconds, decoding_s)
    STAGES["fetch"].observe(seconds - decode_s)
    STAGES["decode"].observe(decode_s)


def fetch_policy(settings: Settings) -> FetchPolicy:
    """The policy that the settings describe."""
    return FetchPolicy(
        allow_networks=settings.image_allow_networks,
        allow_domains=settings.image_allow_domains,
        ports=settings.image_ports,
        max_bytes=settings.image_max_bytes,
        root=settings.image_root,
        total_s=settings.image_timeout_s,
        contact=settings.contact,
        max_redirects=settings.image_max_redirects,
        retry_after_max_s=settings.image_retry_after_max_s,
        respect_noai=settings.image_respect_noai,
        ca_file=settings.ca_file,
    )
