"""Hashes of a checkpoint's files by content: an operator may replace the weights in place."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
from pathlib import Path

from tasks.results import ModelInfo
from worker.runtime.cpu import leave_cores_to_the_engine

logger = logging.getLogger(__name__)


def fingerprint(folder: Path, cache: Path | None = None, pattern: str = "*") -> str:
    """Hash of the files of a folder whose names match, 16 hexadecimal digits. Raises OSError.

    Reading takes some seconds for each 10 GB. So each file's hash is kept in the folder `cache`, under the file's path,
    inode, size and times: no program can set the time of an inode's last change.
    """
    hashes = [(path.name, _content_hash(path, cache)) for path in sorted(folder.glob(pattern)) if path.is_file()]
    return hashlib.sha256(repr(hashes).encode()).hexdigest()[:16]


class WeightsHash:
    """The hash of a model's weights, which a thread reads: a large model's take a minute the first time."""

    def __init__(self, info: ModelInfo, folder: Path | None) -> None:
        """`folder`: the model's, if it is not from the hub."""
        self._info = info
        self._folder = folder
        self._found: str | None = None
        threading.Thread(target=self._read, name="weights-hash", daemon=True).start()

    def __call__(self) -> str | None:
        """16 hexadecimal digits; None until the weights are read, and where there are none."""
        return self._found

    def _read(self) -> None:
        leave_cores_to_the_engine()
        try:
            folder = self._folder or _hub_folder(self._info)
            if folder is not None:
                self._found = fingerprint(folder, hashes_folder(), "*.safetensors")
        except OSError as error:
            logger.warning("Receipts have no hash of the weights, which cannot be read: %s", error)


def hashes_folder() -> Path:
    """The folder where hashes of files are kept: see `fingerprint`."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "idefics-jobs"


def _hub_folder(info: ModelInfo) -> Path | None:
    """The folder of a model that was loaded from the hub; None for another one."""
    if info.revision is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(info.id, "config.json", revision=info.revision)
    return Path(file).parent if isinstance(file, str) else None


def _content_hash(path: Path, cache: Path | None) -> str:
    kept = cache / hashlib.sha256(repr(_identity(path)).encode()).hexdigest() if cache else None
    with contextlib.suppress(OSError):
        if kept:
            return kept.read_text()
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "blake2b").hexdigest()
    with contextlib.suppress(OSError):
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            # Atomically: another worker may start at the same time.
            part = kept.with_suffix(f".{os.getpid()}")
            part.write_text(found)
            part.rename(kept)
    return found


def _identity(path: Path) -> tuple[str | int, ...]:
    state = path.stat()
    return str(path.resolve()), state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
