"""The client that a command works with."""

from __future__ import annotations

import click

from ..client import Client
from ..errors import ModelNotFound
from .console import CommandError, away


def open_client(broker: str | None, results: str | None, queue: str | None, model: str | None) -> Client:
    """A client whose broker answers, and whose model is served. Raises ClickException: UsageError for URLs that cannot
    be used."""
    try:
        client = Client(broker, result_backend=results, queue=queue, model=model)
        client.ping()
        if model is not None:
            _ = client.queue
    except ModelNotFound as error:
        raise CommandError(f"{error.code}: {error}") from None
    except ValueError as error:
        flag = " On the command line it is --results." if "result_backend" in str(error) else ""
        raise click.UsageError(f"{error}{flag}") from None
    except ConnectionError as error:
        raise away(error) from None
    return client
