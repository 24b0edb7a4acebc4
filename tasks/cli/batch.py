"""`idefics-jobs batch`: reads a JSONL file of jobs and writes a JSONL file of answers; resumes after an interruption.

The output is the record of what is done: a whole line is written there before its result is deleted from Redis. While
the batch is unfinished, `OUTPUT.resume` beside it holds the batch's name, from which its jobs' ids are made, the number
of the last line whose job was sent, and a digest of the lines up to there. The next run asks for the results of these
jobs first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

import click
from redis.exceptions import RedisError

from ..batch import PRIORITY, WINDOW, Batch, JobsLost
from ..batch_input import NotJsonLines
from .batch_files import BatchInput, BatchOutput, Resume, open_output
from .console import CommandError, echo, echo_json
from .progress import ProgressDisplay
from .stopping import INTERRUPTED, Stop
from .waiting import watched

ON_AGAIN = " Jobs in flight go on. Run the same command again to go on where it stopped."


@click.command("batch")
@click.argument("input", type=click.File("rb", lazy=False))
@click.argument("output", type=click.Path(dir_okay=False, allow_dash=True))
@click.option("--window", type=click.IntRange(1), default=WINDOW, show_default=True, help="Jobs in flight at most.")
@click.option("--priority", type=click.IntRange(0, 9), default=PRIORITY, show_default=True, help="9 is last.")
@click.option("--retry-failed", is_flag=True, help="Of a finished batch, run the failed lines again.")
@click.option("--keep-results", is_flag=True, help="Leave the results in Redis too, until they expire.")
@click.option(
    "--json", "as_json", is_flag=True,
    help='At the end print {"done": 3, "failed": 0, "stopped": false} on standard output, or on standard error where '
    "OUTPUT is `-`.",
)  # fmt: skip
@click.pass_obj
def batch(
    client: Any,
    input: BinaryIO,
    output: str,
    window: int,
    priority: int,
    retry_failed: bool,
    keep_results: bool,
    as_json: bool,
) -> None:
    """Run a JSONL file of jobs.

    A line of INPUT is {"custom_id": "r1", "task": "caption", "arguments": {"image": "https://..."}} or one of OpenAI's
    batch files. Each gives one line of OUTPUT with its custom_id, as the jobs end: a result, or an error that fails
    this line alone. `-` is standard input or output.

    Where workers serve several models, a line's "model" says which one answers; with --model or --queue all lines go to
    that one.

    Interrupted, it goes on when it is run again with the same files. Exits with 1 where lines have failed.

    \b
    idefics-jobs batch photos.jsonl captions.jsonl
    idefics-jobs batch photos.jsonl captions.jsonl --retry-failed
    """
    note = _note_beside(input, output, retry_failed)
    try:
        lines = BatchInput(input)
    except NotJsonLines as error:
        raise CommandError(str(error)) from None
    source = client()
    options: dict[str, Any] = {"window": window, "priority": priority, "keep_results": keep_results}
    again = ON_AGAIN if note else ""
    try:
        # Closing the output retries a write that a full disk has refused.
        with open_output(output, retry_failed) as out:
            is_stopped = _run(source, lines, out, note, options)
    except RedisError as error:
        raise CommandError(f"Redis refuses: {error}") from None
    except OSError as error:
        raise CommandError(f"Cannot write {error.filename or output}: {error.strerror}.{again}") from None
    if as_json:
        summary = {"done": len(out.done), "failed": out.failed, "stopped": is_stopped}
        echo_json(summary, on_one_line=True, err=output == "-")
    else:
        echo(_summary(len(out.done), out.failed, is_stopped, bool(note)), err=True)
    sys.exit(INTERRUPTED if is_stopped else 1 if out.failed else 0)


def _summary(done: int, failed: int, is_stopped: bool, has_file: bool) -> str:
    told = f"{done:,} lines done, {failed:,} of them failed"
    if is_stopped:
        return f"Stopped: {told}.{ON_AGAIN if has_file else ''}"
    return f"{told}: --retry-failed runs these again." if failed and has_file else f"{told}."


def _run(source: Any, lines: BatchInput, out: BatchOutput, note: Path | None, options: dict[str, Any]) -> bool:
    """Run the batch. Returns whether it was stopped before its end."""
    resume, told = Resume(note, lines), ProgressDisplay(len(out.done))
    options = {**options, "on_note": told.note}
    try:
        with Stop() as stop, watched(source, told.note):
            while not _carried_out(Batch(source, lines, **resume.options(out), **options), lines, out, told, stop):
                resume.note(0)
                if not lines.can_rewind:
                    raise CommandError("Run the same command again: it sends the lost jobs again.")
    finally:
        told.close()
    if not stop.is_asked:
        resume.drop()
    return stop.is_asked


def _note_beside(input: BinaryIO, output: str, retry_failed: bool) -> Path | None:
    """The path of the resume file; None if the output is not a file."""
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


def _carried_out(run: Batch, lines: BatchInput, out: BatchOutput, told: ProgressDisplay, stop: Stop) -> bool:
    """Run the batch to its end or until it is stopped. False if jobs were lost and it must begin again."""
    try:
        for answers in run.turns():
            out.write(answers)
            told.tell(out, lines, run)
            run.is_stopped = stop.is_asked
    except JobsLost as lost:
        told.note(f"{lost} They are sent again.")
        return False
    return True
