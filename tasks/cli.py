"""`idefics-jobs`: submit a job and read its result from a shell."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, get_origin

import click
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from .batch_command import batch
from .client import Client
from .deliveries import deliveries
from .errors import IdeficsError, JobError
from .failed import failed
from .payloads import DEFAULT_PRIORITY, PAYLOADS, QUEUE, Job, Result, parse
from .picture_forms import media_type
from .pictures import Image
from .printable import away, echo, echo_json
from .schema import schema
from .waiting import watched

#: `caption` for `idefics.caption`.
TASKS = {name.partition(".")[2]: payload for name, payload in PAYLOADS.items()}


@click.group()
@click.version_option(package_name="idefics-jobs")
@click.option("--broker", help="Redis URL of the queues. [env: IDEFICS_BROKER_URL]")
@click.option("--results", help="Redis URL of the results. [env: IDEFICS_RESULT_BACKEND]")
@click.option("--queue", help="The jobs' queue. [env: IDEFICS_QUEUE]")
@click.pass_context
def main(context: click.Context, broker: str | None, results: str | None, queue: str | None) -> None:
    """Jobs for the IDEFICS workers."""
    context.obj = lambda: _client(broker, results, queue or os.environ.get("IDEFICS_QUEUE") or QUEUE)


main.add_command(batch)
main.add_command(failed)
main.add_command(deliveries)


def _client(broker: str | None, results: str | None, queue: str) -> Client:
    try:
        client = Client(broker, result_backend=results, queue=queue)
        client.ping()
    except ValueError as error:
        flag = " On the command line it is --results." if "result_backend" in str(error) else ""
        raise click.UsageError(f"{error}{flag}") from None
    except ConnectionError as error:
        raise away(error) from None
    return client


@main.command()
@click.argument("task", type=click.Choice(sorted(TASKS)))
@click.argument("fields", nargs=-1)
@click.option("--priority", type=click.IntRange(0, 9), default=DEFAULT_PRIORITY, show_default=True)
@click.option("--wait", is_flag=True, help="Wait for the result and print it.")
@click.option("--timeout", type=float, default=None, help="Seconds to wait.")
@click.pass_obj
def submit(client: Any, task: str, fields: tuple[str, ...], priority: int, wait: bool, timeout: float | None) -> None:
    """Queue a job; prints its id, or with --wait its result.

    FIELDS are name=value; name:=JSON; name=@FILE for a picture. A list's name may be given several times.

    \b
    idefics-jobs submit caption image=@cat.png --wait
    idefics-jobs submit answer image=https://example.com/a.jpg question="What is this?"
    idefics-jobs submit classify image=@cat.png labels=animal labels=food --wait
    """
    try:
        payload = parse(f"idefics.{task}", arguments(TASKS[task], fields))
    except JobError as error:
        _fail(error)
    try:
        source = client()
        job = source.submit(payload, priority=priority)
    except (RedisError, OperationalError) as error:
        raise away(error) from None
    except IdeficsError as error:
        _fail(error)
    if wait:
        _print_result(source, job, timeout)
    else:
        echo(job.id)


@main.command()
@click.argument("id")
@click.option("--timeout", type=float, default=None, help="Seconds to wait.")
@click.pass_obj
def result(client: Any, id: str, timeout: float | None) -> None:
    """Wait for a job and print its result as JSON. A failed job exits with 1 and its code on standard error."""
    source = client()
    _print_result(source, source.job(id), timeout)


@main.command("schema")
def print_schema() -> None:
    """Print the JSON Schema of every task's arguments, of the result and of a callback's event."""
    click.echo(json.dumps(schema(), indent=2))


def _print_result(source: Any, job: Any, timeout: float | None) -> None:
    try:
        with watched(source):
            answer: Result = job.result(timeout)
    except RedisError as error:
        raise away(error) from None
    except (IdeficsError, TimeoutError) as error:
        _fail(error)
    echo_json(answer.model_dump(mode="json"))


def _fail(error: Exception) -> Any:
    code = f"{error.code}: " if isinstance(error, IdeficsError) else ""
    echo(f"{code}{error}", err=True)
    sys.exit(1)


def arguments(payload: type[Job], fields: tuple[str, ...]) -> dict[str, Any]:
    """The shell's name=value fields as a task's keyword arguments. Raises click.UsageError."""
    found: dict[str, Any] = {}
    for field in fields:
        name, value = _field(field)
        if _is_list(payload, name) and not isinstance(value, list):
            found.setdefault(name, []).append(value)
        else:
            found[name] = value
    return found


def _field(field: str) -> tuple[str, Any]:
    name, separator, value = field.partition("=")
    if not separator:
        raise click.UsageError(f"{field!r} is not name=value.")
    if name.endswith(":"):
        try:
            return name[:-1], json.loads(value)
        except ValueError as error:
            raise click.UsageError(f"{name[:-1]} is no JSON: {error}") from None
    if value.startswith("@"):
        return name, data_uri(Path(value[1:]))
    if is_picture_meant(name, value):
        raise click.UsageError(f"{name}: {value} is a file: write {name}=@{value} to send it.")
    return name, value


def _is_list(payload: type[Job], name: str) -> bool:
    field = payload.model_fields.get(name)
    return field is not None and get_origin(field.annotation) is list


def is_picture_meant(name: str, value: str) -> bool:
    """Whether a value names a file that was to be sent: a picture, or any where only an image may stand."""
    try:
        path = Path(value)
        if len(value) > 4096 or not path.is_file():
            return False
        with path.open("rb") as file:
            return name in ("image", "images") or media_type(file.read(64)) is not None
    except (OSError, ValueError):
        return False


def data_uri(path: Path) -> str:
    """A picture's file as a `data:` URI. Raises click.UsageError where it cannot be read, or ImageInvalid."""
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise click.UsageError(f"Cannot read {path}: {problem}.") from None
    return Image.from_bytes(content)
