"""Small copies of a job's pictures, for a person who looks at its answer."""

from __future__ import annotations

import io
import logging
import threading
import weakref
from collections.abc import Callable

from worker.images.decode import ImageLimits, open_image

logger = logging.getLogger(__name__)

#: Pixels of a copy's longer side, and the quality of its JPEG.
EDGE, QUALITY = 768, 80
#: Bytes of files that all jobs together hold while they run, to be copied only if the copy is needed: that takes nearly
#: as long as the picture's decoding. Beyond them a copy is made at once.
HELD_BYTES = 2**28


def small_copy(data: bytes, limits: ImageLimits) -> bytes:
    """A picture's file as a small JPEG. Raises a JobError for a file that `open_image` refuses."""
    image = open_image(data, limits, target=EDGE)
    image.thumbnail((EDGE, EDGE), reducing_gap=2.0)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


class _HeldBytes:
    """Counts bytes up to a limit. Thread-safe."""

    def __init__(self) -> None:
        # Python may collect garbage, and so release bytes, in a thread that holds it.
        self._lock = threading.RLock()
        self._sum = 0

    def take(self, count: int) -> bool:
        """Count `count` more bytes, and return True; False, and count none, if that would exceed the limit."""
        with self._lock:
            if self._sum + count > HELD_BYTES:
                return False
            self._sum += count
            return True

    def release(self, files: dict[int, bytes]) -> None:
        with self._lock:
            self._sum -= sum(map(len, files.values()))


# Of the process.
_held = _HeldBytes()


class PictureCopies:
    """Copies of some of a job's pictures. Its files may be kept from several threads at once."""

    def __init__(self, chosen: range, copy: Callable[[bytes], bytes]) -> None:
        """`chosen`: the numbers of the pictures, in the order of the prompt. `copy`: see ImageLoader."""
        self._chosen = chosen
        self._copy = copy
        self._lock = threading.Lock()
        #: By number.
        self._files: dict[int, bytes] = {}
        self._copies: dict[int, bytes] = {}
        # However its job ends.
        weakref.finalize(self, _held.release, self._files)

    def keep(self, number: int, data: bytes) -> None:
        """Keep a picture's file, if it is one of those chosen."""
        if number not in self._chosen:
            return
        if _held.take(len(data)):
            with self._lock:
                self._files[number] = data
        else:
            self._add(number, data)

    def jpegs(self) -> list[bytes]:
        """The copies, in order, without pictures of which none could be made."""
        for number, data in self._files.items():
            self._add(number, data)
        return [self._copies[number] for number in sorted(self._copies)]

    def _add(self, number: int, data: bytes) -> None:
        try:
            copy = self._copy(data)
        except Exception as error:
            logger.warning("A picture has no copy for its reviewer: %s", type(error).__name__)
            return
        with self._lock:
            self._copies[number] = copy
