"""Every file of Pillow's own tests, crash corpus included, through the image opener: `python -m benchmarks.corpus`.

They are part of Pillow's source distribution (47 MB), which pip downloads.
"""

from __future__ import annotations

import multiprocessing
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from benchmarks import measures
from tasks.errors import ImageInvalid, ImageTooLarge
from worker.images.decode import open_image

IMAGES = "/Tests/images/"
#: How files begin that once broke Pillow. The others are "other": good ones, and broken ones of its tests.
KINDS = ("crash-", "timeout-", "oom-", "ossfuzz-")
#: Seconds for pip.
FETCH_S = 240.0


class NotFetched(RuntimeError):
    """pip could not fetch Pillow's source distribution; the message holds its last line."""


def fetched(folder: Path) -> Path:
    """The source distribution of the Pillow that runs here. Raises NotFetched."""
    # pip prepares its metadata too, in an environment of its own: nothing is compiled.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "1", "--no-deps"]
    command += ["--no-binary", "pillow", "--dest", str(folder), f"pillow=={metadata.version('pillow')}"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=FETCH_S)
    except subprocess.CalledProcessError as error:
        raise NotFetched((error.stderr.strip().splitlines() or [f"pip ended with {error.returncode}"])[-1]) from None
    except subprocess.TimeoutExpired:
        raise NotFetched(f"pip took more than {FETCH_S:g} s") from None
    return next(folder.glob("*.tar.gz"))


def files(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Each file's name below Tests/images, and its bytes. Nothing is unpacked."""
    with tarfile.open(archive) as tar:
        for member in tar:
            content = tar.extractfile(member) if IMAGES in member.name else None
            if content is not None:
                yield member.name.partition(IMAGES)[2], content.read()


def opened(archive: Path) -> dict[str, Any]:
    """The outcome of each file. Raises any error other than the two that an image may have."""
    ends: defaultdict[str, Counter[str]] = defaultdict(Counter)
    times: list[float] = []
    # A process of its own: one that a file kills is told from the campaign, and its memory is the opener's.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        before = peak = process.submit(_peak_mb).result()
        for name, data in files(archive):
            try:
                end, seconds, peak = process.submit(_open, data).result()
            except BrokenProcessPool:
                raise RuntimeError(f"{name} kills the process that opens it.") from None
            ends[_kind(name)][end] += 1
            times.append(seconds)
    return {
        "pillow": metadata.version("pillow"),
        "tried": len(times),
        "ends": {kind: dict(counts.most_common()) for kind, counts in sorted(ends.items())},
        "slowest_ms": round(1000 * max(times), 1),
        "peak_mb": peak - before,
    }


def _open(data: bytes) -> tuple[str, float, int]:
    """How a file ends, its seconds, and the most memory that this process ever had."""
    # Of the processor: other processes do not make it longer.
    started = time.thread_time()
    end = end_of(data)
    return end, time.thread_time() - started, _peak_mb()


def end_of(data: bytes) -> str:
    """What becomes of a file: `opened`, or the code of one of the two errors that an image may end in."""
    try:
        with warnings.catch_warnings():
            # Pillow's, of broken EXIF.
            warnings.simplefilter("ignore")
            image = open_image(data)
    except (ImageInvalid, ImageTooLarge) as error:
        return error.code
    assert image.mode == "RGB"
    return "opened"


def _peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10


def _kind(name: str) -> str:
    start = PurePosixPath(name).name
    return next((kind.rstrip("-") for kind in KINDS if start.startswith(kind)), "other")


def corpus() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return opened(fetched(Path(folder)))


if __name__ == "__main__":
    measures.run(__doc__, {"corpus": corpus})
