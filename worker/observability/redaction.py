"""What may be logged of an error that nobody expected while it worked on a stranger's job."""

from __future__ import annotations

import traceback

from worker.observability.log_lines import Lines


def without_values(error: BaseException) -> Lines:
    """Its class and where it was raised. Not its message, which may repeat a prompt or a URL: `KeyError: 'secret'`."""
    return Lines(f"{type(error).__name__}\n{''.join(traceback.format_tb(error.__traceback__))}")
