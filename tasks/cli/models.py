"""`idefics-jobs models`: which models the workers serve."""

from __future__ import annotations

from typing import Any

import click
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from ..errors import IdeficsError
from .console import away, echo_json, echo_rows, json_option
from .jobs import fail


@click.command("models")
@json_option
@click.pass_obj
def show_models(client: Any, as_json: bool) -> None:
    """Show the models that workers serve: name, id, queue.

    The name or the id is what --model takes, and a batch's lines as "model". A model without a name is that of the
    queue idefics, where jobs go that name no model.

    \b
    idefics-jobs models
    """
    source = client()
    try:
        models = source.models()
    except (RedisError, OperationalError) as error:
        raise away(error) from None
    except IdeficsError as error:
        fail(error)
    if as_json:
        for model in models:
            echo_json({"name": model.name, "id": model.id, "queue": model.queue}, on_one_line=True)
    else:
        echo_rows(("name", "id", "queue"), ((model.name or "-", model.id, model.queue) for model in models))
