"""`idefics-jobs batch`: a JSONL file in, a JSONL file out, and on again after any interruption.

The output is the record of what is done: a line stands there, whole, before its result is forgotten in Redis. Beside
it, while the batch is unfinished, lies `OUTPUT.resume` with the batch's name, which its jobs' ids are made from, the
number of the last line whose job was sent, and a digest of the lines up to there. Whoever goes on asks for the results
of these first.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import signal
import stat
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import click
from redis.exceptions import RedisError

from .batch import PRIORITY, WINDOW, Batch, JobsLost
from .batch_input import NotJsonLines, json_lines
from .batch_lines import Fingerprints, answered, is_failed
from .printable import echo, escaped, escaped_json
from .waiting import watched

if sys.platform != "win32":
    import fcntl

#: The exit code of what Ctrl-C ended.
INTERRUPTED = 130
ON_AGAIN = " Jobs in flight go on. Run the same command again to go on where it stopped."
#: Seconds between two lines of progress: on a terminal, elsewhere.
LIVE_S, LOGGED_S = 0.5, 10.0
#: Every whole line of an output begins with one of these.
_BEGINNINGS = (b'{"custom_id": ', b'{"id": "batch_req_')


class Output:
    """The answers, one a line. A file is kept from other runs by a lock; standard output holds nothing yet."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._is_file = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        #: The lines that are answered.
        self.done = Fingerprints()
        self.failed = 0
        if self._is_file:
            self._lock()
            self._look()

    def _lock(self) -> None:
        if sys.platform != "win32":
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise click.ClickException("Another run writes to this output: wait for it, or stop it.") from None

    def _look(self) -> None:
        """Read what is done, and cut off a last line that a killed run has half written."""
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
        """On the disk when this returns: their results are forgotten next."""
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
        """Put a copy without the failed lines in the file's place, in one step."""
        copy = path.with_name(f"{path.name}.new")
        self._file.seek(0)
        with copy.open("wb") as new:
            new.writelines(text for text in self._file if not is_failed(json.loads(text)))
            new.flush()
            os.fsync(new.fileno())
        copy.replace(path)


def _foreign(number: int) -> click.ClickException:
    return click.ClickException(f"Line {number} of the output is no answer of a batch: name another file.")


@contextlib.contextmanager
def _output(path: str, retry_failed: bool) -> Iterator[Output]:
    if path == "-":
        yield Output(sys.stdout.buffer)
        return
    if retry_failed and Path(path).exists():
        with _opened(path) as file:
            Output(file).without_failed(Path(path))
    with _opened(path) as file:
        yield Output(file)


def _opened(path: str) -> BinaryIO:
    try:
        # Not truncated, and not in append mode, which cannot seek.
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    except OSError as error:
        raise click.ClickException(f"Cannot write {path}: {error.strerror}.") from None


class Resume:
    """What an unfinished batch is gone on with."""

    _FORM = "{name} {sent:020} {digest}\n"

    def __init__(self, path: Path | None, lines: Input) -> None:
        """None: nothing is kept."""
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
        # Before the first job is sent.
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        self.note(self.sent)

    def note(self, sent: int) -> None:
        """Say when that line is the last one read."""
        self.sent = sent
        if self._path:
            # The same number of bytes each time: nobody reads half a note.
            note = self._FORM.format(name=self.name, sent=sent, digest=self._lines.digest)
            os.pwrite(self._file, note.encode(), 0)

    def options(self, out: Output) -> dict[str, Any]:
        """What a Batch is told of earlier runs."""
        return {"name": self.name, "sent": self.sent, "done": out.done, "on_sent": self.note}

    def drop(self) -> None:
        if self._path:
            self._path.unlink(missing_ok=True)


class Input:
    """The lines, and how much of them is read."""

    def __init__(self, file: BinaryIO) -> None:
        """Raises NotJsonLines for a file that is plainly something else."""
        self._file = file
        about = os.fstat(file.fileno())
        #: Bytes; 0 where it is no file.
        self._size = about.st_size if stat.S_ISREG(about.st_mode) else 0
        self._hash = _hash()
        self._is_begun = False
        self._lines = json_lines(file)

    @property
    def can_rewind(self) -> bool:
        return self._size > 0

    @property
    def share(self) -> float:
        """Of the bytes read; 0 where it cannot be known."""
        return self._file.tell() / self._size if self._size else 0.0

    @property
    def digest(self) -> str:
        """Of the lines read."""
        return str(self._hash.hexdigest())

    def begins(self, lines: int, digest: str) -> bool:
        """Whether its first lines have that digest. True where it can be read only once."""
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


class Progress:
    """Tells how far it is on standard error: a terminal has one live line."""

    def __init__(self, already: int) -> None:
        self._already = already
        self._is_live = sys.stderr.isatty()
        self._started = time.monotonic()
        self._told_at = 0.0 if self._is_live else self._started
        self._trouble = ""

    def tell(self, out: Output, lines: Input, run: Batch) -> None:
        now = time.monotonic()
        if now - self._told_at < (LIVE_S if self._is_live else LOGGED_S) and run.trouble == self._trouble:
            return
        self._told_at, self._trouble = now, run.trouble
        done = len(out.done)
        told = progress(done, out.failed, (done - self._already) / (now - self._started), lines.share, run.in_flight)
        told += f"; waiting: {escaped(run.trouble)}" if run.trouble else ""
        click.echo(f"\r\033[K{told}" if self._is_live else told, err=True, nl=not self._is_live)

    def note(self, text: str) -> None:
        """A line of its own."""
        click.echo(f"\r\033[K{text}" if self._is_live else text, err=True)

    def close(self) -> None:
        if self._is_live:
            click.echo("\r\033[K", err=True, nl=False)


def progress(done: int, failed: int, rate: float, share: float, in_flight: int) -> str:
    """The line of progress. `share` of the input has been read: the lines done and those in flight."""
    told = f"{done:,} lines done, {failed:,} failed, {in_flight:,} in flight, {rate:,.1f}/s"
    if rate and share:
        left = (done + in_flight) / share - done
        told += f", about {_duration(left / rate)} left"
    return told


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


class _Stop:
    """Asked for by Ctrl-C or SIGTERM; a second one ends at once."""

    def __init__(self) -> None:
        self.is_asked = False

    def __enter__(self) -> _Stop:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        self.is_asked = True
        signal.signal(number, signal.SIG_DFL)


@click.command("batch")
@click.argument("input", type=click.File("rb", lazy=False))
@click.argument("output", type=click.Path(dir_okay=False, allow_dash=True))
@click.option("--window", type=click.IntRange(1), default=WINDOW, show_default=True, help="Jobs in flight at most.")
@click.option("--priority", type=click.IntRange(0, 9), default=PRIORITY, show_default=True, help="9 is last.")
@click.option("--retry-failed", is_flag=True, help="Of a finished batch, run the failed lines again.")
@click.option("--keep-results", is_flag=True, help="Leave the results in Redis too, until they expire.")
@click.pass_obj
def batch(
    client: Any, input: BinaryIO, output: str, window: int, priority: int, retry_failed: bool, keep_results: bool
) -> None:
    """Run a JSONL file of jobs.

    A line of INPUT is {"custom_id": "r1", "task": "caption", "arguments": {"image": "https://..."}} or one of OpenAI's
    batch files. Each gives one line of OUTPUT with its custom_id, as the jobs end: a result, or an error that fails
    this line alone. `-` is standard input or output.

    Interrupted, it goes on when it is run again with the same files. Exits with 1 where lines have failed.

    \b
    idefics-jobs batch photos.jsonl captions.jsonl
    idefics-jobs batch photos.jsonl captions.jsonl --retry-failed
    """
    note = _note_beside(input, output, retry_failed)
    try:
        lines = Input(input)
    except NotJsonLines as error:
        raise click.ClickException(escaped(str(error))) from None
    source = client()
    options: dict[str, Any] = {"window": window, "priority": priority, "keep_results": keep_results}
    again = ON_AGAIN if note else ""
    try:
        # Closing the output tries once more to write what a full disk has refused.
        with _output(output, retry_failed) as out:
            is_stopped = _run(source, lines, out, note, options)
    except RedisError as error:
        raise click.ClickException(escaped(f"Redis refuses: {error}")) from None
    except OSError as error:
        raise click.ClickException(f"Cannot write {error.filename or output}: {error.strerror}.{again}") from None
    done = f"{len(out.done):,} lines done, {out.failed:,} of them failed"
    if is_stopped:
        click.echo(f"Stopped: {done}.{again}", err=True)
        sys.exit(INTERRUPTED)
    click.echo(f"{done}{': --retry-failed runs these again.' if out.failed and note else '.'}", err=True)
    sys.exit(1 if out.failed else 0)


def _run(source: Any, lines: Input, out: Output, note: Path | None, options: dict[str, Any]) -> bool:
    """Whether it was stopped before its end."""
    resume, told = Resume(note, lines), Progress(len(out.done))
    try:
        with _Stop() as stop, watched(source, told.note):
            while not _carried_out(Batch(source, lines, **resume.options(out), **options), lines, out, told, stop):
                resume.note(0)
                if not lines.can_rewind:
                    raise click.ClickException("Run the same command again: it sends the lost jobs again.")
    finally:
        told.close()
    if not stop.is_asked:
        resume.drop()
    return stop.is_asked


def _note_beside(input: BinaryIO, output: str, retry_failed: bool) -> Path | None:
    """Where to keep what an unfinished batch is gone on with; None where the output is no file."""
    path = Path(output)
    if output == "-" or (path.exists() and not path.is_file()):
        if retry_failed:
            raise click.UsageError("--retry-failed needs an output file of a finished batch.")
        return None
    if path.exists() and os.path.samestat(path.stat(), os.fstat(input.fileno())):
        raise click.UsageError("INPUT and OUTPUT are the same file.")
    note = path.with_name(f"{path.name}.resume")
    if retry_failed and note.exists():
        raise click.UsageError(f"The batch is unfinished ({note} says so): run it to its end without --retry-failed.")
    return note


def _carried_out(run: Batch, lines: Input, out: Output, told: Progress, stop: _Stop) -> bool:
    """Whether it came to its end, or to the user's; False where jobs were lost and it must begin again."""
    try:
        for answers in run.turns():
            out.write(answers)
            told.tell(out, lines, run)
            run.is_stopped = stop.is_asked
    except JobsLost as lost:
        echo(f"{lost} They are sent again.", err=True)
        return False
    return True
