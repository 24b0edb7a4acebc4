"""The rights of the broker's user, checked when a channel starts to consume."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from typing import Any

from celery.exceptions import ImproperlyConfigured
from redis.exceptions import NoPermissionError, ResponseError

from tasks.redis_keys import GUIDES_SEPARATOR, SEPARATOR, list_name
from worker.queue.backoff import Backoff
from worker.queue.reserve import RESERVE, reserve_request

logger = logging.getLogger(__name__)


def check_may_reserve(client: Any, record_keys: tuple[str, str], prefix: str, backoff: Backoff) -> None:
    """Run the reserve script over no lists. Raises ImproperlyConfigured where the broker's user may run no script."""
    try:
        client.execute_command("EVAL", RESERVE, *reserve_request((), (), (), {}).arguments(record_keys, prefix))
    except NoPermissionError as error:
        raise ImproperlyConfigured(
            f"The broker's user may not run scripts ({error}): add +eval +evalsha +rpop to its ACL, "
            "or set IDEFICS_ATOMIC_RESERVE=false and lose a job whenever a worker dies while it takes it."
        ) from error
    except ResponseError as error:
        backoff.complain(error)


def readable_separators(client: Any, own: str, queues: Collection[str], step: int, backoff: Backoff) -> list[str]:
    """Our own separator, and those of other producers whose lists the broker's user may read.

    Its rights may name the queues' lists with kombu's separator alone.
    """
    others = [separator for separator in (SEPARATOR, GUIDES_SEPARATOR) if separator != own]
    return [own, *(separator for separator in others if _may_read(client, queues, step, separator, backoff))]


def _may_read(client: Any, queues: Iterable[str], step: int, separator: str, backoff: Backoff) -> bool:
    try:
        for queue in queues:
            client.llen(list_name(queue, step, separator))
    except NoPermissionError:
        logger.info("The broker's user may not read lists with the separator %r: they are left alone.", separator)
        return False
    except ResponseError as error:
        backoff.complain(error)
    return True
