"""Sentry, as IDEFICS_SETUP=worker.observability.sentry:set_up: an event for each record at ERROR.

The SDK's other integrations are off: they would send what jobs contain, such as local variables and the URLs of
requests, and report a defect a second time.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import TYPE_CHECKING

from worker.observability.job_fields import job_fields

if TYPE_CHECKING:
    from sentry_sdk.types import Event, Hint


def set_up(process: str) -> None:
    """Start the SDK in a process of a worker. Raises RuntimeError where it is not installed or has no DSN."""
    try:
        import sentry_sdk
        from sentry_sdk.integrations.logging import LoggingIntegration
    except ImportError:
        raise RuntimeError("sentry-sdk is not installed: pip install sentry-sdk") from None
    if not os.environ.get("SENTRY_DSN"):
        raise RuntimeError("SENTRY_DSN is not set: it names your Sentry project")
    # SENTRY_ENVIRONMENT and SENTRY_RELEASE are read by the SDK.
    sentry_sdk.init(
        default_integrations=False,
        auto_enabling_integrations=False,
        integrations=[LoggingIntegration(level=None, event_level=logging.ERROR, sentry_logs_level=None)],
        include_local_variables=False,
        before_send=functools.partial(_tagged, process),
    )


def _tagged(process: str, event: Event, hint: Hint) -> Event:
    """The event with the process and the fields of its job as tags. Called in the thread that logged the record."""
    # Whatever a library attached to its record, as in worker/observability/log_json.py.
    event.pop("extra", None)
    record = hint.get("log_record")
    event["tags"] = {"process": process, **(job_fields(record) if record else {})}
    return event
