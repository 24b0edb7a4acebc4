"""`idefics-jobs verify`: runs a job again alone, and compares its answer with the one that it had."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from kombu.exceptions import OperationalError
from pydantic import ValidationError
from redis.exceptions import RedisError

from ..batch_lines import read_line
from ..errors import IdeficsError
from ..payloads import Job
from ..protocol import ALONE
from ..results import Result
from ..verification import Comparison, compare
from .console import away, echo, echo_json, json_line_option
from .jobs import fail, timeout_option
from .waiting import watched

#: Fields that do not change an answer, or that would end it early or send it to others.
_DROPPED = ("callback", "deadline_s", "idempotency_key")
_NO_RECEIPT = "The {} has no receipt: its worker is older than this command. Upgrade the workers."


@click.command()
@click.argument("result")
@click.option(
    "--job",
    "job_file",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The job: a JSON file with one line of a batch file, ours or OpenAI's.",
)
@timeout_option
@json_line_option
@click.pass_obj
def verify(client: Any, result: str, job_file: Path, timeout: float | None, as_json: bool) -> None:
    """Run a job again alone, and say whether it gets the same answer.

    RESULT is a job's id, or a JSON file with its result. A worker runs the job without others beside it and without its
    caches, with the seed of the first answer. The answer is "identical", or the command says what differs: what the
    answer depends on (weights, prompt, pixels ...), and where the answer itself does. It then exits with 1.

    The workers do not keep jobs, so the file of --job has it: {"task": "caption", "arguments": {"image": "..."}}.

    \b
    idefics-jobs verify 8f14e45f-ceea-4672-a9b5-0a2f9d7c2c1f --job job.json
    """
    source = client()
    try:
        first = _result_of(source, result, timeout)
        again = _run_alone(source, _repeatable(_job_of(job_file), first), timeout)
    except (RedisError, OperationalError) as error:
        raise away(error) from None
    except (IdeficsError, TimeoutError) as error:
        fail(error)
    if again.receipt is None:
        raise click.ClickException(_NO_RECEIPT.format("second answer"))
    found = compare(first, again)
    if as_json:
        told = {"identical": found.is_identical, **asdict(found)}
        echo_json(told | {"first": _receipt(first), "again": _receipt(again)}, on_one_line=True)
    else:
        echo(_sentence(found))
    sys.exit(0 if found.is_identical else 1)


def _result_of(client: Any, named: str, timeout: float | None) -> Result:
    """The first answer, of a file or of the job with this id."""
    path = Path(named)
    if path.is_file():
        try:
            told = json.loads(path.read_bytes())
            # As `idefics-jobs result` prints it, or as a line of a batch's output has it.
            first = Result.model_validate(told.get("result", told))
        except (ValueError, AttributeError, ValidationError):
            raise click.ClickException(f"{named} is not a result: save what `idefics-jobs result` prints.") from None
    else:
        with watched(client):
            first = client.result(named, timeout)
    if first.receipt is None:
        raise click.ClickException(_NO_RECEIPT.format("result"))
    return first


def _job_of(path: Path) -> Job:
    """The job of a file. Raises a JobError or ClickException."""
    try:
        asked = json.loads(path.read_bytes())
        arguments = asked.get("arguments", {})
        for name in _DROPPED:
            arguments.pop(name, None)
    except (ValueError, AttributeError):
        raise click.ClickException(f"{path} is not a JSON object with a job: see --help.") from None
    return read_line(1, json.dumps({"custom_id": "job", **asked})).job()


def _repeatable(job: Job, first: Result) -> Job:
    """The job with the seed that its first answer had."""
    seed = first.receipt.seed if first.receipt else None
    return job if seed is None else job.model_copy(update={"seed": seed})


def _run_alone(client: Any, job: Job, timeout: float | None) -> Result:
    sent = client.submit(job, headers={ALONE: True})
    with watched(client):
        again: Result = sent.result(timeout)
    return again


def _receipt(result: Result) -> Any:
    return result.receipt.model_dump(mode="json") if result.receipt else None


def _sentence(found: Comparison) -> str:
    if found.is_identical:
        return "identical"
    causes = f"{', '.join(found.causes)} changed" if found.causes else "nothing that it depends on changed"
    answer = f"the answer differs first in its {found.answer}" if found.answer else "the answer is the same"
    return f"different: {answer}; {causes}"
