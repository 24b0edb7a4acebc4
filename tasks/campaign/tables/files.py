"""Opens a table's file: local or at a URL, compressed or not; and replaces an output when it is whole."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from ..errors import TableError

_URL = re.compile(r"[a-z][a-z0-9+.-]+://|[a-z0-9+.-]+::", re.IGNORECASE)
INSTALL = "pip install 'idefics-jobs[data]'"
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


def is_url(path: str) -> bool:
    """Whether a path is fsspec's to open: s3://, https://, memory://."""
    return bool(_URL.match(path))


def suffixes(path: str) -> tuple[str, str]:
    """The suffix of a file's format and that of its compression: `.csv` and `.gz`; empty where it has none."""
    name = path.partition("?")[0].partition("#")[0] if is_url(path) else path
    name = PurePosixPath(name.rstrip("/")).name.lower()
    name = f"{name[:-4]}.tar.gz" if name.endswith(".tgz") else name
    stem, dot, last = name.rpartition(".")
    compression = dot + last if dot and dot + last in _COMPRESSED else ""
    return PurePosixPath(stem if compression else name).suffix, compression


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """A file's content, decompressed by its suffix. Raises TableError if it cannot be opened or read."""
    compression = suffixes(path)[1]
    with reported(path), contextlib.ExitStack() as stack:
        yield _decompressed(stack.enter_context(raw(path)), compression, stack)


@contextlib.contextmanager
def raw(path: str) -> Iterator[BinaryIO]:
    """A file as it is, seekable where its place allows."""
    if not is_url(path):
        with Path(path).open("rb") as file:
            yield file
        return
    files, place = located(path)
    with files.open(place, "rb") as file:
        yield file


@contextlib.contextmanager
def reported(path: str) -> Iterator[None]:
    """Turns the exceptions of files and filesystems into TableError."""
    try:
        yield
    except TableError:
        raise
    except FileNotFoundError:
        raise TableError(f"There is no file {path}.") from None
    except ImportError as error:
        raise TableError(f"{path}: {error}") from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise TableError(f"Cannot read {path}: {_told(error)}.") from None
    except Exception as error:
        # Each of fsspec's filesystems has exceptions of its own.
        if is_url(path):
            raise TableError(f"Cannot read {path}: {_told(error)}.") from None
        raise


def _told(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return reason.rstrip(".")


def located(url: str) -> tuple[Any, str]:
    """fsspec's filesystem of a URL, and the path there. Raises TableError."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise TableError(f"{url} is a URL, which needs fsspec: {INSTALL}.") from None
    try:
        return cast(tuple[Any, str], url_to_fs(url))
    except (ImportError, ValueError) as error:
        # It names the package that is missing.
        raise TableError(f"Cannot open {url}: {error}") from None


def is_folder(path: str) -> bool:
    """Whether a path is an existing folder. Raises TableError."""
    with reported(path):
        if not is_url(path):
            return Path(path).is_dir()
        files, place = located(path)
        return bool(files.isdir(place))


def arrow(path: str) -> Any:
    """The module pyarrow. Raises TableError if it is not installed."""
    try:
        import pyarrow
    except ImportError:
        raise TableError(f"{path} needs pyarrow: {INSTALL}.") from None
    return pyarrow


def _decompressed(file: BinaryIO, compression: str, stack: contextlib.ExitStack) -> BinaryIO:
    if compression == ".zst":
        return cast(BinaryIO, stack.enter_context(arrow("A .zst file").CompressedInputStream(file, "zstd")))
    unpack: dict[str, Callable[[BinaryIO], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return cast(BinaryIO, stack.enter_context(unpack[compression](file))) if compression else file


# Outputs


class Replacement:
    """A file that takes an output's place when it is whole. Written beside it, or for a URL in a temporary folder."""

    def __init__(self, path: str) -> None:
        """Raises TableError if it cannot be made."""
        self._path = path
        if is_url(path):
            _check_can_be_written(path)
        folder = None if is_url(path) else str(Path(path).absolute().parent)
        name = PurePosixPath(path.rstrip("/")).name
        try:
            number, self.path = tempfile.mkstemp(prefix=f".{name[:100]}.", suffix=".part", dir=folder)
        except OSError as error:
            raise TableError(f"Cannot write {path}: {error.strerror}.") from None
        os.close(number)

    def opened(self) -> Any:
        """The new file, compressed by the output's suffix."""
        compression = suffixes(self._path)[1]
        if compression == ".zst":
            return arrow(self._path).CompressedOutputStream(self.path, "zstd")
        pack: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, "": open}
        return pack[compression](self.path, "wb")

    def commit(self) -> None:
        """Put the closed file in the output's place. Raises TableError."""
        try:
            if is_url(self._path):
                files, place = located(self._path)
                files.put_file(self.path, place)
                return
            with Path(self.path).open("rb") as file:
                os.fsync(file.fileno())
            self._take_permissions()
            Path(self.path).replace(self._path)
        except TableError:
            raise
        except Exception as error:
            # Each of fsspec's filesystems has exceptions of its own.
            raise TableError(f"Cannot write {self._path}: {_told(error)}.") from None
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove the new file, if it is still there."""
        Path(self.path).unlink(missing_ok=True)

    def _take_permissions(self) -> None:
        """Those of the file that is replaced, else of any new file: a temporary one is private."""
        try:
            mode = Path(self._path).stat().st_mode & 0o777
        except FileNotFoundError:
            mask = os.umask(0)
            os.umask(mask)
            mode = 0o666 & ~mask
        Path(self.path).chmod(mode)


def _check_can_be_written(url: str) -> None:
    files, _ = located(url)
    protocols = {files.protocol} if isinstance(files.protocol, str) else set(files.protocol)
    if protocols & {"http", "https"}:
        raise TableError(f"Cannot write {url}: name a file, or a bucket as in s3://.")
