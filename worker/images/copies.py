"""Small copies of a job's pictures, for a person who looks at its answer."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable

from worker.images.decode import ImageLimits, open_image

logger = logging.getLogger(__name__)

#: Pixels of a copy's longer side, and the quality of its JPEG.
EDGE, QUALITY = 768, 80
#: Bytes of a file up to which it is held while its job runs, and copied only when the copy is needed. The copy of a
#: larger one is made at once: a hundred jobs would hold gigabytes.
HELD_BYTES = 500_000


def small_copy(data: bytes, limits: ImageLimits) -> bytes:
    """A picture's file as a small JPEG. Raises a JobError for a file that `open_image` refuses."""
    image = open_image(data, limits, target=EDGE)
    image.thumbnail((EDGE, EDGE), reducing_gap=2.0)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


class PictureCopies:
    """Copies of some of a job's pictures. Its files may be kept from several threads at once."""

    def __init__(self, chosen: range, copy: Callable[[bytes], bytes]) -> None:
        """`chosen`: the numbers of the pictures, in the order of the prompt. `copy`: see ImageLoader."""
        self._chosen = chosen
        self._copy = copy
        self._lock = threading.Lock()
        #: By number: small files, and copies of large ones.
        self._files: dict[int, bytes] = {}
        self._copies: dict[int, bytes] = {}

    def keep(self, number: int, data: bytes) -> None:
        """Keep a picture's file, if it is one of those chosen."""
        if number not in self._chosen:
            return
        if len(data) <= HELD_BYTES:
            with self._lock:
                self._files[number] = data
        else:
            self._add(number, data)

    def jpegs(self) -> list[bytes]:
        """The copies, in order, without pictures of which none could be made. To be called once."""
        while self._files:
            self._add(*self._files.popitem())
        return [self._copies[number] for number in sorted(self._copies)]

    def _add(self, number: int, data: bytes) -> None:
        try:
            copy = self._copy(data)
        except Exception as error:
            logger.warning("A picture has no copy for its reviewer: %s", type(error).__name__)
            return
        with self._lock:
            self._copies[number] = copy
