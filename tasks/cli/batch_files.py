"""The input and output of a batch, and the file `OUTPUT.resume` by which an unfinished batch is resumed."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import stat
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import click

from ..batch_input import json_lines
from ..batch_lines import Fingerprints, answered, is_failed
from ..printable import escaped_json
from .console import CommandError

if sys.platform != "win32":
    import fcntl

#: Every complete line of an output begins with one of these.
_BEGINNINGS = (b'{"custom_id": ', b'{"id": "batch_req_')


class BatchOutput:
    """The answers, one a line. A file is locked against other runs; standard output has no earlier answers."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._is_file = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        #: Fingerprints of the answered lines.
        self.done = Fingerprints()
        self.failed = 0
        if self._is_file:
            self._lock()
            self._read_answers()

    def _lock(self) -> None:
        if sys.platform != "win32":
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise CommandError("Another run writes to this output: wait for it, or stop it.") from None

    def _read_answers(self) -> None:
        """Read the answers of earlier runs, and cut off a last line that a killed run has half written."""
        whole = 0
        self._file.seek(0)
        for number, text in enumerate(self._file, 1):
            if not text.endswith(b"\n"):
                if not any(text.startswith(start[: len(text)]) for start in _BEGINNINGS):
                    raise _foreign(number)
                break
            self._note(number, text)
            whole += len(text)
        self._file.truncate(whole)
        self._file.seek(whole)

    def _note(self, number: int, text: bytes) -> None:
        try:
            answer = json.loads(text)
            self.done.add(answered(answer))
        except (ValueError, KeyError):
            raise _foreign(number) from None
        self.failed += is_failed(answer)

    def write(self, answers: list[dict[str, Any]]) -> None:
        """Write answers and sync them to disk: their results are deleted next."""
        if not answers:
            return
        for answer in answers:
            self.done.add(answered(answer))
            self.failed += is_failed(answer)
        lines = (escaped_json(json.dumps(answer, ensure_ascii=False)) for answer in answers)
        self._file.write("".join(f"{line}\n" for line in lines).encode())
        self._file.flush()
        if self._is_file:
            os.fsync(self._file.fileno())

    def without_failed(self, path: Path) -> None:
        """Replace the file by a copy without the failed lines, atomically."""
        copy = path.with_name(f"{path.name}.new")
        self._file.seek(0)
        with copy.open("wb") as new:
            new.writelines(text for text in self._file if not is_failed(json.loads(text)))
            new.flush()
            os.fsync(new.fileno())
        copy.replace(path)


def _foreign(number: int) -> CommandError:
    return CommandError(f"Line {number} of the output is not an answer of a batch: name another file.")


@contextlib.contextmanager
def open_output(path: str, retry_failed: bool) -> Iterator[BatchOutput]:
    if path == "-":
        yield BatchOutput(sys.stdout.buffer)
        return
    if retry_failed and Path(path).exists():
        with _opened(path) as file:
            BatchOutput(file).without_failed(Path(path))
    with _opened(path) as file:
        yield BatchOutput(file)


def _opened(path: str) -> BinaryIO:
    try:
        # Without truncation, and not in append mode, which cannot seek.
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    except OSError as error:
        raise CommandError(f"Cannot write {path}: {error.strerror}.") from None


class Resume:
    """The resume file of an unfinished batch."""

    _FORM = "{name} {sent:020} {digest}\n"

    def __init__(self, path: Path | None, lines: BatchInput) -> None:
        """`path` None: no file is kept."""
        self._path = path
        self._lines = lines
        self.name, self.sent = uuid.uuid4().hex, 0
        if path is None:
            return
        with contextlib.suppress(FileNotFoundError, ValueError):
            name, sent, digest = path.read_text().split()
            if lines.begins(int(sent), digest):
                self.name, self.sent = name, int(sent)
            else:
                click.echo("The input has changed meanwhile: its lines that have no answer are sent anew.", err=True)
        # Written before the first job is sent.
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        self.note(self.sent)

    def note(self, sent: int) -> None:
        """Record the number of the last line whose job was sent. That line must be the last one read."""
        self.sent = sent
        if self._path:
            # Always the same number of bytes, so that a reader never sees half a record.
            note = self._FORM.format(name=self.name, sent=sent, digest=self._lines.digest)
            os.pwrite(self._file, note.encode(), 0)

    def options(self, out: BatchOutput) -> dict[str, Any]:
        """The arguments of a Batch that describe earlier runs."""
        return {"name": self.name, "sent": self.sent, "done": out.done, "on_sent": self.note}

    def drop(self) -> None:
        if self._path:
            self._path.unlink(missing_ok=True)


class BatchInput:
    """The input's lines, and how much of them is read."""

    def __init__(self, file: BinaryIO) -> None:
        """Raises NotJsonLines for a file that is clearly something else."""
        self._file = file
        about = os.fstat(file.fileno())
        #: Bytes; 0 if it is not a file.
        self._size = about.st_size if stat.S_ISREG(about.st_mode) else 0
        self._hash = _hash()
        self._is_begun = False
        self._lines = json_lines(file)

    @property
    def can_rewind(self) -> bool:
        return self._size > 0

    @property
    def share(self) -> float:
        """The share of the bytes that is read; 0 if unknown."""
        return self._file.tell() / self._size if self._size else 0.0

    @property
    def digest(self) -> str:
        """Digest of the lines read."""
        return str(self._hash.hexdigest())

    def begins(self, lines: int, digest: str) -> bool:
        """Whether its first lines have that digest. True if it can be read only once."""
        if not self.can_rewind:
            return True
        for _ in itertools.islice(self, lines):
            pass
        return self.digest == digest

    def __iter__(self) -> Iterator[bytes]:
        if self._is_begun:
            self._file.seek(0)
            self._hash, self._lines = _hash(), json_lines(self._file)
        self._is_begun = True
        for line in self._lines:
            assert isinstance(line, bytes)
            self._hash.update(line)
            yield line


def _hash() -> Any:
    return hashlib.blake2b(digest_size=8)
