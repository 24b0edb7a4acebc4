"""The client that a command works with."""

from __future__ import annotations

import click

from ..client import Client
from .console import away


def open_client(broker: str | None, results: str | None, queue: str) -> Client:
    """A client whose broker answers. Raises ClickException: UsageError for URLs that cannot be used."""
    try:
        client = Client(broker, result_backend=results, queue=queue)
        client.ping()
    except ValueError as error:
        flag = " On the command line it is --results." if "result_backend" in str(error) else ""
        raise click.UsageError(f"{error}{flag}") from None
    except ConnectionError as error:
        raise away(error) from None
    return client
