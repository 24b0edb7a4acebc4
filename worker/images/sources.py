"""An image's bytes from its source: a URL, a data: URI, or a path below the operator's folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from tasks.errors import ImageBlocked, ImageInvalid, ImageUnreachable
from tasks.image_sources import BLANKS, base64_bytes, data_head, is_inner_path
from tasks.payload_fields import CheckedImage
from worker.images.fetch import Fetcher, FetchPolicy, requested_host, too_large
from worker.images.host_limits import HostLimiter
from worker.observability import tracing

#: Bytes that one read asks for in addition to the file's stated size.
READ_AHEAD_BYTES = 16_384

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: opening a fifo without a writer would wait forever.
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class SourceReader:
    """Reads images from all three kinds of source. Thread-safe."""

    def __init__(self, policy: FetchPolicy, hosts: HostLimiter | None = None) -> None:
        """`hosts`: limits of downloads; by default eight from each host."""
        self._policy = policy
        self._fetcher = Fetcher(policy)
        self._hosts = HostLimiter(8) if hosts is None else hosts

    def read(self, source: CheckedImage, wait_s: float | None = None, *, may_park: bool = False) -> bytes:
        """The bytes of one image, not yet checked to be a picture. `wait_s`, `may_park`: see `HostLimiter.acquire`.

        Raises ImageBlocked, ImageTooLarge, ImageInvalid, ImageUnreachable (retryable), or HostLimitReached.
        """
        if not isinstance(source, str):
            return read_below(self._policy.root, source.path, self._policy.max_bytes)
        if not is_remote(source):
            return decode_data_uri(source, self._policy.max_bytes)
        host = requested_host(source)
        with tracing.stage("fetch"), self._hosts.acquire(host, wait_s, may_park=may_park):
            try:
                return self._fetcher.fetch(source)
            except ImageUnreachable as error:
                # No job of any worker asks this host before then; it may redirect to the one that answered so.
                if error.retry_after_s:
                    self._hosts.close(host, min(error.retry_after_s, self._policy.retry_after_max_s))
                raise


def is_remote(source: CheckedImage) -> bool:
    """True for a source that is read from the network."""
    return isinstance(source, str) and source[:5].lower() != "data:"


def decode_data_uri(uri: str, max_bytes: int) -> bytes:
    """Decode a `data:image/...;base64,` URI. Raises ImageBlocked, ImageInvalid or ImageTooLarge."""
    start = data_head(uri)
    if start is None:
        raise ImageBlocked(
            "Of data: URIs only data:image/...;base64, is read: send the image in this form.", detail="data_uri"
        )
    # Checked before decoding, so that a huge one is not copied. Padding subtracts up to two bytes.
    size = (len(uri) - start) // 4 * 3 - uri.count("=", len(uri) - 2)
    if size > max_bytes:
        # Blanks and escapes are not bytes of the image.
        size -= sum(uri.count(blank, start) for blank in BLANKS.decode()) + 2 * uri.count("%", start)
    if size > max_bytes:
        raise too_large("The data: URI holds", max_bytes)
    try:
        return base64_bytes(uri[start:])
    except ValueError:
        raise ImageInvalid(
            "The data: URI is not valid base64: encode the image's bytes anew.", detail="data_uri"
        ) from None


def read_below(root: Path | None, path: str, max_bytes: int) -> bytes:
    """Read a regular file strictly below `root`. Raises ImageBlocked, ImageInvalid or ImageTooLarge."""
    if root is None:
        raise ImageBlocked(
            "This worker reads no local files: send a URL, or have IDEFICS_IMAGE_ROOT set.", detail="path"
        )
    relative = PurePosixPath(path)
    if not is_inner_path(path):
        raise ImageBlocked(
            "The image's path leaves the image root (IDEFICS_IMAGE_ROOT): write it from there, without '..'.",
            detail="path",
        )
    try:
        try:
            return _read_file(root, relative.parts, max_bytes)
        except OSError:
            # The path may contain a link that leads to another place below the root.
            return _read_file(*_inside(root, relative), max_bytes)
    except (OSError, RuntimeError, ValueError):
        raise ImageInvalid(
            "The image's path names no readable file: check it below the image root (IDEFICS_IMAGE_ROOT).",
            detail="no_file",
        ) from None


def _inside(root: Path, relative: PurePosixPath) -> tuple[Path, tuple[str, ...]]:
    base = root.resolve(strict=True)
    real = (base / relative).resolve()
    if base not in real.parents:
        raise ImageBlocked(
            "The image's path leaves the image root (IDEFICS_IMAGE_ROOT): copy the file below the root.", detail="path"
        )
    return base, real.relative_to(base).parts


@contextmanager
def _opened(base: Path, parts: tuple[str, ...]) -> Iterator[int]:
    # Step by step, without following links, since a part may have been replaced by a link after it was resolved. Only
    # the root may be a link, since it belongs to the operator.
    opened = [os.open(base, _FOLDER_FLAGS & ~os.O_NOFOLLOW)]
    try:
        for name in parts[:-1]:
            opened.append(os.open(name, _FOLDER_FLAGS, dir_fd=opened[-1]))
        opened.append(os.open(parts[-1], _FILE_FLAGS, dir_fd=opened[-1]))
        yield opened[-1]
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _read_file(base: Path, parts: tuple[str, ...], max_bytes: int) -> bytes:
    with _opened(base, parts) as descriptor:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ImageInvalid("The image's path is not a regular file: name one.", detail="no_file")
        data = _contents(descriptor, status.st_size, max_bytes + 1)
    if len(data) > max_bytes:
        raise too_large("The image's file has", max_bytes)
    return data


def _contents(descriptor: int, size: int, max_bytes: int) -> bytes:
    """Read up to `max_bytes` bytes of a file. `size`: the stated one; files grow, and some in /proc state 0."""
    chunks: list[bytes] = []
    left = max_bytes
    while left and (chunk := os.read(descriptor, min(left, size + READ_AHEAD_BYTES))):
        chunks.append(chunk)
        left -= len(chunk)
    return b"".join(chunks)
